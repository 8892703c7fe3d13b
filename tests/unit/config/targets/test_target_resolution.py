"""Where targets are searched, the same by `check` (source only) and by a run (import), and what is built from them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disttrain.config import (
    ConfigProblem,
    Target,
    build_nested,
    build_target,
    check_arguments,
    load_config,
    render_config,
    resolve_target,
)
from disttrain.config.targets.source_search import find_target_problems
from disttrain.engine.build import build_callable
from disttrain.errors import ConfigError

PLACES = ("folder", "working", "installed")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Three folders in the order in which modules are searched. Modules imported from them are removed afterwards."""
    before = set(sys.modules)
    for name in PLACES:
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    monkeypatch.chdir(tmp_path / "working")
    yield lambda name: tmp_path / name
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def by_source(target: str, args: dict[str, Any], folder: Path) -> list[ConfigProblem]:
    """The result of `check`, from the source alone."""
    return find_target_problems({"data": {"train": {"target": target, "args": args}}}, {}, folder)


def by_import(target: str, args: dict[str, Any], folder: Path) -> Any:
    """The object that a run builds."""
    return build_target(Target(target=target, args=args), section="data", folder=folder)


@pytest.mark.parametrize(
    "present", [c for n in (1, 2, 3) for c in itertools.combinations(PLACES, n)], ids=lambda c: "-".join(c)
)
def test_the_first_of_folder_working_directory_and_installed_wins_for_check_and_run(
    places: Callable[[str], Path], present: tuple[str, ...]
) -> None:
    # The module in each folder takes an argument with a different name, so both results show which module was read.
    for place in present:
        (places(place) / "placed.py").write_text(f"def make(in_{place}):\n    return in_{place}\n")
    winner = next(place for place in PLACES if place in present)
    assert by_source("placed:make", {f"in_{winner}": 5}, places("folder")) == []
    assert by_import("placed:make", {f"in_{winner}": 5}, places("folder")) == 5
    for other in set(PLACES) - {winner}:
        (problem,) = by_source("placed:make", {f"in_{winner}": 5, f"in_{other}": 5}, places("folder"))
        assert problem.key == f"data.train.args.in_{other}"
        with pytest.raises(ConfigError, match=f"in_{other}"):
            by_import("placed:make", {f"in_{winner}": 5, f"in_{other}": 5}, places("folder"))


PACKAGE = {
    "parts/__init__.py": "from .inner import Net as Renamed\nfrom parts.inner import *\nVALUE = 3\n",
    "parts/inner.py": (
        "class Net:\n"
        "    Half = None\n"
        "    def __init__(self, width, *, depth=1): self.args = (width, depth)\n"
        "    @classmethod\n"
        "    def build(cls, width): return cls(width, depth=9)\n"
        "class Outer:\n"
        "    class Nested:\n"
        "        def __init__(self, a=0): self.a = a\n"
    ),
}


def write_package(folder: Path) -> None:
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        ("parts.inner:Net", {"width": 2}, (2, 1)),
        ("parts.inner.Net", {"width": 2, "depth": 3}, (2, 3)),
        ("parts:Net", {"width": 2}, (2, 1)),
        ("parts.Renamed", {"width": 2}, (2, 1)),
        ("parts.inner:Net.build", {"width": 2}, (2, 9)),
        ("parts.inner.Net.build", {"width": 2}, (2, 9)),
    ],
)
def test_every_form_of_a_path_resolves_to_the_same_object(
    places: Callable[[str], Path], target: str, args: dict[str, Any], expected: tuple[int, int]
) -> None:
    write_package(places("folder"))
    assert by_source(target, args, places("folder")) == []
    assert by_import(target, args, places("folder")).args == expected


@pytest.mark.parametrize(
    ("target", "args", "found", "do"),
    [
        ("nowhere.inner:Net", {}, "no module 'nowhere.inner'", "correct the path"),
        ("nowhere.Net", {}, "no module 'nowhere'", "correct the path"),
        ("parts.iner:Net", {}, "no module 'parts.iner'", "correct the path"),
        ("parts.inner:Nett", {}, "has no 'Nett'", "did you mean 'Net'?"),
        ("parts.inner.Nett", {}, "has no 'Nett'", "did you mean 'Net'?"),
        ("parts.inner:Net", {"widht": 2}, "'widht'", "did you mean 'width'?"),
        ("parts.Renamed", {"width": 1, "widht": 2}, "'widht'", "did you mean 'width'?"),
        ("parts.inner:Net", {}, "width", ""),
    ],
)
def test_check_and_run_reject_the_same_targets(
    places: Callable[[str], Path], target: str, args: dict[str, Any], found: str, do: str
) -> None:
    write_package(places("folder"))
    (problem,) = by_source(target, args, places("folder"))
    assert found in problem.problem and do in problem.fix
    with pytest.raises(ConfigError) as caught:
        by_import(target, args, places("folder"))
    assert found in str(caught.value) and do in str(caught.value)


def test_an_existing_object_that_is_not_callable_is_rejected_at_import(places: Callable[[str], Path]) -> None:
    write_package(places("folder"))
    with pytest.raises(ConfigError, match="a int, which cannot be called"):
        by_import("parts:VALUE", {}, places("folder"))
    with pytest.raises(ConfigError, match=r"parts.inner has no 'Nope'"):
        by_import("parts.inner:Net.Nope", {}, places("folder"))


def test_the_source_is_read_and_never_run(places: Callable[[str], Path]) -> None:
    (places("folder") / "explosive.py").write_text("raise SystemExit('user code ran')\ndef make(a): ...\n")
    assert by_source("explosive:make", {"a": 1}, places("folder")) == []
    (places("folder") / "torn.py").write_text("def make(a):\n    return (\n")
    (problem,) = by_source("torn:make", {"a": 1}, places("folder"))
    assert "torn.py:2 does not parse" in problem.problem


@pytest.mark.parametrize(
    "source",
    [
        "globals().update(make=lambda **args: args)",
        "exec('def make(**args): return args')",
        "import sys\nsetattr(sys.modules[__name__], 'make', dict)",
        "def __getattr__(name): return dict",
        "from collections import *\nfrom builtins import *\nmake = 0\ndel make\ndef __getattr__(name): return dict",
        "def make(b): return {}\nmake = dict",
        "from functools import partial\ndef make(b): return {}\nmake = partial(dict, c=1)",
        "def wrap(f): return dict\n@wrap\ndef make(b): ...",
        "if True:\n    def make(**args): return args\nelse:\n    def make(b): ...",
        "try:\n    from nowhere_at_all import make\nexcept ImportError:\n    make = dict",
        "class M(type):\n  def __call__(cls, **a): return a\nclass make(metaclass=M):\n  def __init__(self, b): ...",
        "def define():\n    global make\n    make = dict\ndefine()",
        "class Base:\n    def __init__(self, a): ...\nclass make(Base): ...",
        "for make in (dict,): pass",
        "with open(__file__) as make: pass\nmake = dict",
    ],
)
def test_names_that_the_source_does_not_show_are_left_to_the_run(places: Callable[[str], Path], source: str) -> None:
    (places("folder") / "dynamic.py").write_text(source + "\n")
    assert by_source("dynamic:make", {"a": 1}, places("folder")) == []
    by_import("dynamic:make", {"a": 1}, places("folder"))


def test_names_inside_functions_and_classes_are_no_names_of_the_module(places: Callable[[str], Path]) -> None:
    source = "def main():\n    Net = 3\nclass Other:\n    Net = 4\nalso = [Net for Net in ()]\n"
    (places("folder") / "locals_only.py").write_text(source)
    (problem,) = by_source("locals_only:Net", {}, places("folder"))
    assert "has no 'Net'" in problem.problem and problem.fix == "known: Other, also, main"


@pytest.mark.parametrize("key", ["weight_decy", "lrr"])
def test_a_misspelt_argument_of_a_class_reexported_by_its_package_is_detected(key: str) -> None:
    values = {"optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.1, key: 0.1}}}
    (problem,) = find_target_problems(values, {f"optim.args.{key}": "c.yaml:9"}, Path.cwd())
    assert (problem.key, problem.where) == (f"optim.args.{key}", "c.yaml:9")
    assert "did you mean 'weight_decay'?" in problem.fix or "did you mean 'lr'?" in problem.fix
    good = {"optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.1, "betas": [0.9, 0.95], "fused": True}}}
    assert find_target_problems(good, {}, Path.cwd()) == []


def test_a_collate_function_is_a_target_itself(places: Callable[[str], Path]) -> None:
    """A function that makes one is not, because its items are no argument that a config could give."""
    source = "def pad(items, *, length=3):\n    return items[:length]\ndef make(length):\n    return pad\n"
    (places("folder") / "tagging.py").write_text(source)
    folder = places("folder")

    def problems(target: str, **args: Any) -> list[ConfigProblem]:
        return find_target_problems({"data": {"collate": {"target": target, "args": args}}}, {}, folder)

    assert problems("tagging:pad") == problems("tagging:pad", length=2) == problems("tagging:make", length=2) == []
    assert "no argument 'lenght'" in problems("tagging:pad", lenght=2)[0].problem
    assert build_callable(Target(target="tagging:pad"), "data", folder, takes=1)([1, 2, 3, 4]) == [1, 2, 3]
    assert build_callable(Target(target="tagging:pad", args={"length": 2}), "data", folder, takes=1)([1, 2, 3]) == [
        1,
        2,
    ]


def test_circular_reexports_end(places: Callable[[str], Path]) -> None:
    (places("folder") / "one.py").write_text("from two import make\n")
    (places("folder") / "two.py").write_text("from one import make\n")
    (places("folder") / "three.py").write_text("from ..above import make\n")
    assert by_source("one:make", {"a": 1}, places("folder")) == []
    assert by_source("three:make", {"a": 1}, places("folder")) == []


def test_two_modules_of_one_name_in_one_process_are_never_mixed_up(places: Callable[[str], Path]) -> None:
    for number, place in enumerate(("folder", "working")):
        (places(place) / "namesake.py").write_text(f"def make(): return {number}\n")
    assert by_import("namesake:make", {}, places("folder")) == 0
    assert by_import("namesake:make", {}, places("folder")) == 0
    with pytest.raises(ConfigError) as caught:
        by_import("namesake:make", {}, places("working"))
    assert f"{places('working')}/namesake.py, but this process has already loaded {places('folder')}" in str(
        caught.value
    )


def test_a_users_module_named_like_one_of_pythons_is_rejected_and_not_swapped(places: Callable[[str], Path]) -> None:
    (places("folder") / "itertools.py").write_text("def make(): ...\n")
    (places("folder") / "random.py").write_text("def make(): ...\n")
    with pytest.raises(ConfigError, match=r"random\.py, but this process has already loaded"):
        by_import("random:make", {}, places("folder"))


def test_a_short_name_is_a_part_of_disttrain_in_any_folder(places: Callable[[str], Path]) -> None:
    import disttrain.optim.schedules as ours

    (places("folder") / "disttrain" / "optim").mkdir(parents=True)
    for inside in ("disttrain", "disttrain/optim"):
        (places("folder") / inside / "__init__.py").touch()
    (places("folder") / "disttrain" / "optim" / "schedules.py").write_text("def cosine(optimizer): ...\n")
    assert resolve_target("cosine", section="schedule", folder=places("folder")) is ours.cosine


def test_names_defined_by_the_running_script_resolve() -> None:
    sys.modules["__main__"].made_for_a_test = lambda: 7  # type: ignore[attr-defined]
    try:
        assert resolve_target("__main__:made_for_a_test", section="data", folder=None)() == 7
        assert by_source("__main__:made_for_a_test", {}, Path.cwd()) == []
    finally:
        del sys.modules["__main__"].made_for_a_test  # type: ignore[attr-defined]


def test_mappings_with_a_target_are_built_first_at_any_depth() -> None:
    args = {
        "inner": {"target": "types:SimpleNamespace", "args": {"deep": {"target": "types:SimpleNamespace"}, "x": 1}},
        "list": [{"target": "builtins:complex", "args": {"real": 2, "imag": 3}}, 4],
        "plain": {"a": {"target": "fractions:Fraction", "args": {"numerator": 1, "denominator": 3}}},
        "no_part": {"target": 3, "args": 4, "others": 5},
    }
    found = build_target(Target(target="types:SimpleNamespace", args=args), section="model", folder=None)
    assert found.inner == SimpleNamespace(deep=SimpleNamespace(), x=1)
    assert found.list == [complex(2, 3), 4]
    assert float(found.plain["a"]) == 1 / 3
    assert found.no_part == {"target": 3, "args": 4, "others": 5}
    assert args["list"][0] == {"target": "builtins:complex", "args": {"real": 2, "imag": 3}}, "the config stays"
    again = build_nested(args, section="model", folder=None)
    assert again["inner"] is not found.inner, "each building makes a part of its own"


def test_a_nested_fault_is_reported_with_its_path(places: Callable[[str], Path]) -> None:
    write_package(places("folder"))
    inner = {"target": "parts.inner:Net", "args": {"width": {"target": "parts.inner:Nett"}, "dpth": 1}}
    problems = by_source("builtins:dict", {"list": [0, inner]}, places("folder"))
    assert [problem.key for problem in problems] == [
        "data.train.args.list.1.args.dpth",
        "data.train.args.list.1.args.width.target",
    ]


def make_pair(first: int, second: int = 0, *, context: Any = None) -> tuple[int, int, Any]:
    """A callable that a Python user passes."""
    return first, second, context


def test_a_callable_is_a_target_from_python() -> None:
    config = load_config({"schedule": {"target": make_pair, "args": {"first": 1}}})
    assert config.schedule is not None
    assert build_target(config.schedule, section="schedule", folder=None) == (1, 0, None)
    assert find_target_problems(config.values(), config.sources, config.folder) == []
    assert f"target: {__name__}:make_pair" in render_config(config)
    dynamic = type("Dynamic", (), {})  # its name is no name of its module, so only the object itself can be trusted
    config = load_config({"schedule": {"target": dynamic}})
    assert find_target_problems(config.values(), config.sources, config.folder) == []


def test_offered_arguments_are_passed_where_named_and_args_win() -> None:
    target = Target(target=make_pair, args={"first": 1})
    offered = {"context": "offered", "unwanted": 1}
    assert build_target(target, section="data", folder=None, offered=offered) == (1, 0, "offered")
    named = Target(target=make_pair, args={"first": 1, "context": "own"})
    assert build_target(named, section="data", folder=None, offered=offered) == (1, 0, "own")
    assert build_target(Target(target=make_pair), 8, section="data", folder=None) == (8, 0, None)


@pytest.mark.parametrize(
    ("args", "found", "do"),
    [
        ({"first": 1, "secnd": 2}, "no argument 'secnd'", "did you mean 'second'?"),
        ({"frist": 1}, "no argument 'frist'", "did you mean 'first'?"),
        ({}, "first", "it takes (first: "),
        ({"first": 1, "zzz": 2}, "zzz", "known: context, first, second"),
        ({"first": "(redacted)"}, "first is (redacted)", "pass the value as an override"),
        (
            {"first": 1, "second": {"url": ["x://(redacted)@y"]}},
            "second is (redacted)",
            "pass the value as an override",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_reported_before_the_call(args: dict[str, Any], found: str, do: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(make_pair, (), args, what="data.train.target")
    assert str(caught.value).startswith("Cannot call data.train.target with its args.")
    assert found in str(caught.value) and do in str(caught.value)
    check_arguments(make_pair, (), {"first": 1, "second": 2}, what="")


def test_errors_raised_by_a_users_callable_are_not_wrapped() -> None:
    with pytest.raises(ZeroDivisionError):
        args = {"numerator": 1, "denominator": 0}
        build_target(Target(target="fractions:Fraction", args=args), section="data", folder=None)
