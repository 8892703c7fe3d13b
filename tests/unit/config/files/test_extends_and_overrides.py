"""Files, bases and overrides: the resulting values and their reported sources."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.config import ConfigProblem, ConfigProblemsError, load_config, load_to_train

BASE = """\
version: 1
run: {name: base, seed: 1, steps: 10}
model: {target: gpt, args: {layers: 2, width: 8}, weights: old}
objective: {target: mse}
"""


def write(folder: Path, **files: str) -> Path:
    """Write `name=text` as name.yaml. Returns the last path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{[*files][-1]}.yaml"


def only_problem(source: Any, *overrides: Any) -> ConfigProblem:
    with pytest.raises(ConfigProblemsError) as caught:
        load_config(source, overrides)
    assert len(caught.value.problems) == 1, caught.value
    return caught.value.problems[0]


def test_a_chain_of_files_merges_and_each_value_knows_its_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text(BASE)
    (tmp_path / "deep" / "middle.yaml").write_text("extends: base.yaml\nrun: {seed: 2,\n  name: middle}\n")
    top = write(tmp_path, top="# comment\nextends: deep/middle.yaml\nrun:\n  seed: 3\nreport: {every: 5}\n")
    config = load_config(top, ["run.steps=7"])
    assert (config.run.name, config.run.seed, config.run.steps, config.report.every) == ("middle", 3, 7, 5)
    assert config.model is not None and config.model.args == {"layers": 2, "width": 8}
    assert {key: config.sources[key] for key in ("run.name", "run.seed", "run.steps", "model.args.width")} == {
        "run.name": f"{tmp_path}/deep/middle.yaml:3",
        "run.seed": f"{top}:4",
        "run.steps": "override",
        "model.args.width": f"{tmp_path}/deep/base.yaml:3",
    }
    assert "run.device" not in config.sources, "a default has no place"
    assert config.folder == tmp_path, "import paths resolve from the folder of the file that was asked for"


def test_a_circle_of_files_is_reported_with_its_chain(tmp_path: Path) -> None:
    top = write(tmp_path, a="extends: c.yaml\n", b="version: 1\nextends: a.yaml\n", c="extends: b.yaml\n")
    problem = only_problem(top)
    assert problem.key == "extends"
    assert problem.where == f"{tmp_path}/a.yaml:1"
    assert "c.yaml -> b.yaml -> a.yaml -> c.yaml" in problem.problem


@pytest.mark.parametrize("chain_ends_in", ["extends: nowhere.yaml", "extends: [base.yaml]", "extends: broken.yaml"])
def test_faults_in_the_file_itself_are_reported_in_addition_to_a_broken_chain(
    tmp_path: Path, chain_ends_in: str
) -> None:
    top = write(tmp_path, broken="run: [\n", top=f"run: {{seed: 1, seed: 2}}\n{chain_ends_in}\n")
    with pytest.raises(ConfigProblemsError) as caught:
        load_config(top)
    first, second = caught.value.problems
    broken = chain_ends_in.endswith("broken.yaml")
    assert {first.where, second.where} == {f"{top}:1", f"{tmp_path}/broken.yaml:2" if broken else f"{top}:2"}
    assert "run.seed" in (first.key, second.key)


def test_another_target_drops_the_old_args_and_nothing_else(tmp_path: Path) -> None:
    child = write(tmp_path, base=BASE, child="extends: base.yaml\nmodel: {target: mlp}\n")
    model = load_config(child).model
    assert model is not None and (model.target, model.args, model.weights) == ("mlp", {}, "old")
    same = write(tmp_path, base=BASE, same="extends: base.yaml\nmodel: {target: gpt, args: {width: 16}}\n")
    model = load_config(same).model
    assert model is not None and model.args == {"layers": 2, "width": 16}


def test_an_overridden_target_drops_old_args_in_any_order_of_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE)
    config = load_config(path, ["model.args.inputs=3", "model.target=mlp", "model.args.hidden=[4, 5]"])
    assert config.model is not None and config.model.args == {"inputs": 3, "hidden": [4, 5]}
    assert "model.args.width" not in config.sources


def test_a_nested_target_drops_only_its_args() -> None:
    encoder = {"target": "a.b:C", "args": {"depth": 3}}
    whole = {"model": {"target": "m.n:Net", "args": {"encoder": encoder, "width": 4}}}
    config = load_config(whole, ["model.args.encoder.target=a.b:D"])
    assert config.model is not None
    assert config.model.args == {"encoder": {"target": "a.b:D"}, "width": 4}
    assert whole["model"]["args"]["encoder"] == {"target": "a.b:C", "args": {"depth": 3}}, "the caller's own stays"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("-1.5E+3", -1500.0),
        ("true", True),
        ("null", None),
        ("", None),
        ("'3'", "3"),
        ("2026-01-31", "2026-01-31"),
        ("a=b", "a=b"),
        ("[1, x]", [1, "x"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("../data/x.bin", "../data/x.bin"),
    ],
)
def test_an_override_is_a_yaml_value(text: str, value: Any) -> None:
    config = load_config({"model": {"target": "gpt", "args": {"it": 0}}}, [f"model.args.it={text}"])
    assert config.model is not None
    assert json.dumps(config.model.args["it"]) == json.dumps(value)
    assert config.sources["model.args.it"] == "override"


def test_pairs_and_mappings_override_from_python_and_say_so() -> None:
    for overrides in ([("run.seed", 5)], {"run.seed": 5}, {"run": {"seed": 5}}):
        config = load_config({"run": {"seed": 1, "name": "n"}}, overrides)
        assert (config.run.seed, config.run.name) == (5, "n")
        assert (config.sources["run.seed"], config.sources["run.name"]) == ("argument", "argument")


def test_later_overrides_win_and_a_mapping_merges_with_the_existing_one() -> None:
    config = load_config({"run": {"seed": 1, "name": "n"}}, ["run.seed=2", "run={seed: 3}", "run.seed=4"])
    assert (config.run.seed, config.run.name) == (4, "n")


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("run.seed", "run.seed", "is not section.key=value"),
        ("=5", "", "is not section.key=value"),
        ("run..seed=5", "run..seed", "is not section.key=value"),
        ("run.seed=[", "run.seed", "not YAML"),
        ("run.seed=!!int x", "run.seed", "not YAML"),
        ("run.name=!!python/name:os.system ''", "run.name", "not YAML"),
        ("run.seed.more=1", "run.seed.more", "has no key 'more'"),
        ("nowhere=1", "nowhere", "unknown key 'nowhere'"),
        ("schedule=5", "schedule", "5"),
    ],
)
def test_a_malformed_override_is_reported_with_its_key(override: str, key: str, found: str) -> None:
    problem = only_problem({"run": {"seed": 1}}, override)
    assert (problem.key, problem.where) == (key, "override")
    assert found in problem.problem


def test_a_mapping_given_from_python_is_neither_changed_nor_shared() -> None:
    given_ = {"model": {"target": "gpt", "args": {"sizes": [1, {"a": 2}]}}, "run": {"seed": 1}}
    before = copy.deepcopy(given_)
    config = load_config(given_, ["run.seed=2", "model.args.more=3"])
    assert given_ == before
    given_["model"]["args"]["sizes"][1]["a"] = 99  # type: ignore[index]
    assert config.model is not None and config.model.args["sizes"] == [1, {"a": 2}]


def test_a_finished_config_takes_overrides_and_keeps_what_it_knew(tmp_path: Path) -> None:
    first = load_config(write(tmp_path, base=BASE))
    second = load_config(first, ["run.seed=9"])
    assert (first.run.seed, second.run.seed) == (1, 9)
    assert second.folder == first.folder == tmp_path
    assert second.sources["run.seed"] == "override"
    assert second.sources["run.name"] == first.sources["run.name"] == f"{tmp_path}/base.yaml:2"


def test_a_mapping_resolves_from_the_stated_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config({}).folder == tmp_path
    assert load_config({}, folder=tmp_path / "elsewhere").folder == tmp_path / "elsewhere"


def test_missing_required_sections_are_reported_with_the_other_faults(tmp_path: Path) -> None:
    path = write(tmp_path, top="objective: {target: mse}\nreport: {evry: 3}\n")
    with pytest.raises(ConfigProblemsError) as caught:
        load_to_train(path, ["objective.target=nowhere.parts:it"])
    places = {problem.key: problem.where for problem in caught.value.problems}
    expected = {"model": f"{path}:1", "data": f"{path}:1", "optim": f"{path}:1", "report.evry": f"{path}:2"}
    assert places == {"objective.target": "override", **expected}


def test_training_inputs_are_checked_before_the_start(tmp_path: Path) -> None:
    part = {"target": "builtins:dict"}
    whole = {"run": {"steps": 1}, "model": part, "objective": part, "data": {"train": part, "global_batch": 1}}
    config = load_to_train({**whole, "optim": {"target": "torch.optim.SGD", "args": {"lr": 1}}})
    assert config.optim is not None and config.optim.args == {"lr": 1}
    with pytest.raises(ConfigProblemsError, match=r"optim\.args\.lrr \(argument\)"):
        load_to_train({**whole, "optim": {"target": "torch.optim.SGD", "args": {"lrr": 1}}})


# Keys exclude `target`, which drops its sibling keys and has its tests above.
_KEYS = st.sampled_from(["a", "b", "c"])
_TREES = st.recursive(
    st.integers(0, 9) | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


def merged(low: Any, high: Any) -> Any:
    """The expected result of `high` over `low`: mappings merge key by key, other values are replaced."""
    if not isinstance(low, dict) or not isinstance(high, dict):
        return high
    return {key: merged(low.get(key), high[key]) if key in high else low[key] for key in {**low, **high}}


@settings(max_examples=60, deadline=None)
@given(layers=st.lists(_TREES, min_size=2, max_size=4))
def test_layers_merge_key_by_key(tmp_path_factory: pytest.TempPathFactory, layers: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("layers")
    *files, override = layers
    expected: Any = {}
    for number, args in enumerate(files):
        extends = f"extends: {number - 1}.yaml\n" if number else ""
        text = f"{extends}model: {{target: gpt, args: {json.dumps(args)}}}\n"
        (folder / f"{number}.yaml").write_text(text)
        expected = merged(expected, args)
    expected = merged(expected, override)
    config = load_config(folder / f"{len(files) - 1}.yaml", [f"model.args={json.dumps(override)}"])
    assert config.model is not None and config.model.args == expected
