"""A printed and saved config reads back as itself, shows where values come from, and hides secrets."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from disttrain.config import Config, ConfigProblem, ConfigProblemsError, load_config, parse_value, render_config
from disttrain.config.problems import UnknownNameError
from disttrain.config.render import every_source

# Any text that UTF-8 can hold, except `${`: a reference is resolved before anything is written.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: "${" not in text)
_TRICKY = st.sampled_from(
    [
        *("3e-4", "1.0", "010", "0x1f", "1_000", "1:30", "2026-01-31", ".inf", ".nan", "yes", "NO", "on", "null", "~"),
        *("", " ", "=", "<<", "- a", "a: b", "a #b", "'", '"', "\\", "[", "{a}", "*x", "&x", "!x", "%", "@", "`", "|"),
        *(">", "? ", "---", "...", "\n", "\t", "\x85", "\u2028", "\x00", "\ufeff", "é", "\U0001d6fc", "x" * 200),
    ]
)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)  # which is not equal to itself
    | _TEXTS
    | _TRICKY
)
_KEYS = (_TEXTS | _TRICKY).filter(lambda key: key != "target")  # which turns its mapping into a part to build
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


def strict(value: Any) -> str:
    """Compares like JSON: `True` is not 1, 1 is not 1.0, and the order of keys counts."""
    return json.dumps(value)


@settings(max_examples=150, deadline=None)
@given(args=st.dictionaries(_KEYS, _VALUES, max_size=4), seed=st.integers(0, 2**63 - 1), clip=st.floats(0, 1e6))
def test_a_printed_config_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory, args: dict[str, Any], seed: int, clip: float
) -> None:
    optim = {"target": "torch.optim.AdamW", "clip_norm": clip, "no_decay": ["*.bias", "3"]}
    config = load_config({"run": {"seed": seed}, "model": {"target": "builtins:dict", "args": args}, "optim": optim})
    assume(config.to_dict() == config.to_dict(redact=False))  # secrets do not read back, and have separate tests
    file = tmp_path_factory.mktemp("saved") / "config.yaml"
    file.write_text(render_config(config), encoding="utf-8")
    again = load_config(file)
    assert again.model is not None and again.optim is not None
    assert strict(again.model.args) == strict(args)
    assert (again.run.seed, again.optim.clip_norm, again.optim.no_decay) == (seed, clip, ("*.bias", "3"))
    assert strict(again.to_dict()) == strict(config.to_dict())
    assert strict(parse_value(file.read_text(encoding="utf-8"))) == strict(config.to_dict()), (
        "as a run's folder is read"
    )


def test_the_config_of_a_custom_loop_reads_back_too(tmp_path: Path) -> None:
    config = load_config({"model": {"target": "builtins:dict"}})  # without data, and so without a length of training
    (tmp_path / "c.yaml").write_text(render_config(config))
    assert load_config(tmp_path / "c.yaml").to_dict() == config.to_dict()


def test_every_value_is_printed_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("run: {steps: 4,\n  name: a}\n")
    Path("top.yaml").write_text("extends: base.yaml\noptim: {target: torch.optim.SGD, args: {lr: '${run.steps}'}}\n")
    config = load_config("top.yaml", ["run.seed=5", ("report.every", 2), ("report.trackers", ["tensorboard"])])
    expected = {
        "run.name": "base.yaml:2",
        "run.steps": "base.yaml:1",
        "run.seed": "override",
        "run.device": "default",
        "optim.args.lr": "top.yaml:2",
        "optim.clip_norm": "default",
        "report.every": "argument",
        "report.trackers": "argument",
        "model": "default",
        "strategy.fsdp.reshard": "default",
    }
    found = every_source(config)
    assert {key: found[key] for key in expected} == expected
    lines = render_config(config).splitlines()
    for key, source in expected.items():
        depth, name = key.count("."), key.rpartition(".")[2]
        assert any(line.startswith(f"{'  ' * depth}{name}: ") and line.endswith(f"  # {source}") for line in lines), key


def secretive(args: dict[str, Any]) -> tuple[Config, str]:
    """A config with these args, and every text that is printed or saved of it."""
    config = load_config({"model": {"target": "builtins:dict", "args": args}})
    return config, render_config(config) + json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("args", "secret"),
    [
        ({"api_key": "s3cr3t-value"}, "s3cr3t"),
        ({"apiKey": "s3cr3t-value"}, "s3cr3t"),
        ({"OPENAI_API_KEY": "s3cr3t-value"}, "s3cr3t"),
        ({"hf_token": "s3cr3t-value"}, "s3cr3t"),
        ({"token": "s3cr3t-value"}, "s3cr3t"),
        ({"db": {"password": "s3cr3t-value"}}, "s3cr3t"),
        ({"password": 12345678}, "12345678"),
        ({"credentials": {"user": "ann-of-old", "more": ["s3cr3t-value"]}}, "s3cr3t"),
        ({"list": [{"aws_secret_access_key": "s3cr3t-value"}]}, "s3cr3t"),
        ({"url": "https://ann:s3cr3t@host/x"}, "s3cr3t"),
        ({"url": "https://host/x?api_key=s3cr3t&b=1"}, "s3cr3t"),
        ({"header": "Bearer s3cr3t"}, "s3cr3t"),
        ({"token": "s3cr3t-value", "header": "X-Auth ${model.args.token}."}, "s3cr3t"),
        ({"token": "s3cr3t-value", "copy": {"deep": ["${model.args.token}"]}}, "s3cr3t"),
    ],
)
def test_a_secret_is_used_and_never_printed(args: dict[str, Any], secret: str) -> None:
    config, printed = secretive(args)
    assert secret not in printed
    assert "(redacted)" in printed
    assert config.model is not None
    assert secret in str(config.model.args) and "(redacted)" not in str(config.model.args)
    assert secret in str(config.to_dict(redact=False))


@pytest.mark.parametrize(
    "args",
    [
        {"tokens": 5, "tokenizer": "gpt2", "keys": 3, "key_dim": 8, "monkey": "x", "author": "ann"},
        {"pad_token": "<pad>", "end_of_text_token": "<|endoftext|>", "special_token": "[X]", "ignore_token": -100},
        {"max_token": 512, "per_token": True, "password": None, "secret": ""},
        {"auth": "basic", "mode": "basic"},
    ],
)
def test_values_with_names_that_only_resemble_secrets_are_printed(args: dict[str, Any]) -> None:
    config, _ = secretive(args)
    assert config.to_dict()["model"]["args"] == {**args, **({"auth": "(redacted)"} if "auth" in args else {})}


def test_a_fault_does_not_print_the_secret_it_is_about() -> None:
    for source, overrides in (
        ({"model": {"target": "gpt", "api_key": "s3cr3t-value"}}, ()),
        ({}, ["model.args.api_key"]),
        ({}, ["report.api_key='s3cr3t-value"]),
        ({"report": {"every": {"password": "s3cr3t-value"}}}, ()),
        ({"model": {"target": "gpt", "args": {"vocab": 3, "context": 2, "hf_token": "s3cr3t-value"}}, "no": 1}, ()),
    ):
        with pytest.raises(ConfigProblemsError) as caught:
            load_config(source, overrides)
        assert "s3cr3t" not in str(caught.value)


@dataclasses.dataclass
class Shape:
    """An argument that a Python user may pass."""

    width: int
    parts: tuple[int, ...]


def make(width: int = 1) -> None:
    """A callable that a config can name."""


class Maker:
    """A callable object, and a method that a config can name."""

    def __call__(self) -> None: ...
    def build(self) -> None: ...


def test_python_objects_are_printed_by_name_and_read_back(tmp_path: Path) -> None:
    args = {
        "shape": Shape(3, (4, 5)),
        "path": Path("x"),
        "inf": math.inf,
        "set": {1},
        "make": make,
        "part": functools.partial(make, width=2),
        "callable": Maker(),
        "cls": Maker,
        "method": Maker.build,
        "lambda": lambda: 0,
    }
    config = load_config({"model": {"target": make, "args": args}})
    assert config.model is not None and config.model.target is make and config.model.args["shape"] == Shape(3, (4, 5))
    here = __name__
    expected = {
        "shape": {"width": 3, "parts": [4, 5]},
        "path": f"({type(Path('x')).__module__}:{type(Path('x')).__qualname__})",
        "inf": math.inf,
        "set": [1],
        "make": f"{here}:make",
        "part": f"{here}:make.<partial>",
        "callable": f"{here}:Maker.<instance>",
        "cls": f"{here}:Maker",
        "method": f"{here}:Maker.build",
        "lambda": f"{here}:test_python_objects_are_printed_by_name_and_read_back.<locals>.<lambda>",
    }
    model = config.to_dict()["model"]
    assert (model["target"], model["args"], model["weights"]) == (f"{here}:make", expected, None)
    (tmp_path / "c.yaml").write_text(render_config(config))
    assert load_config(tmp_path / "c.yaml").to_dict() == config.to_dict()


def test_a_config_is_frozen() -> None:
    config = load_config({"run": {"seed": 1}, "strategy": {"fsdp": {"reshard": False}}})
    for owner, name in (
        (config, "run"),
        (config.run, "seed"),
        (config.strategy, "name"),
        (config.strategy.fsdp, "reshard"),
    ):
        with pytest.raises(ValueError, match="frozen"):
            setattr(owner, name, getattr(owner, name))
    with pytest.raises(TypeError):
        config.sources["run.seed"] = "nowhere"  # type: ignore[index]


def test_errors_can_leave_a_process() -> None:
    problems = ConfigProblemsError(
        [ConfigProblem("run.seed", "c.yaml:2", "3", "mend it"), ConfigProblem("", "c.yaml:1", "x", "y")]
    )
    again = pickle.loads(pickle.dumps(problems))
    assert (str(again), again.problems) == (str(problems), problems.problems)
    name = UnknownNameError("a", "b", "c")
    assert str(pickle.loads(pickle.dumps(name))) == str(name)
