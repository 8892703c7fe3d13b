"""`${section.key}`: the values it becomes, and the forms that are rejected."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.config import ConfigProblem, ConfigProblemsError, load_config


def args_of(args: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = load_config({"model": {"target": "builtins:dict", "args": args}, **sections})
    assert config.model is not None
    return config.model.args


def problems_of(args: dict[str, Any], **sections: Any) -> tuple[ConfigProblem, ...]:
    with pytest.raises(ConfigProblemsError) as caught:
        args_of(args, **sections)
    return caught.value.problems


@pytest.mark.parametrize("value", [3, 2.5, True, None, "text", "7", [1, [2]], {"a": {"b": 1}}])
def test_a_complete_value_keeps_its_type(value: Any) -> None:
    found = args_of({"one": value, "two": "${model.args.one}", "three": "${ model.args.two }"})
    for key in ("two", "three"):
        assert found[key] == value and type(found[key]) is type(value)


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (2.5, "2.5"), (True, "true"), (None, "null"), ("x y", "x y"), (False, "false")]
)
def test_inside_a_text_it_is_written_as_yaml_writes_it(value: Any, text: str) -> None:
    assert args_of({"one": value, "two": "a-${model.args.one}/${model.args.one}"})["two"] == f"a-{text}/{text}"


def test_it_reaches_defaults_lists_and_other_sections() -> None:
    found = args_of(
        {"seed": "${run.seed}", "device": "${run.device}", "second": "${model.args.list.1.a}", "list": [0, {"a": 5}]},
        run={"seed": 8},
    )
    assert found == {"seed": 8, "device": "auto", "second": 5, "list": [0, {"a": 5}]}


def test_it_reads_the_overridden_values(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: {seed: 1}\nmodel: {target: gpt, args: {a: '${run.seed}', b: ['${model.args.a}']}}\n")
    config = load_config(path, ["run.seed=2"])
    assert config.model is not None and config.model.args == {"a": 2, "b": [2]}


def test_braces_without_a_dollar_are_text() -> None:
    assert args_of({"a": "{x} $y $"})["a"] == "{x} $y $"


@pytest.mark.parametrize(
    ("args", "circle"),
    [
        ({"a": "${model.args.a}"}, "model.args.a -> model.args.a"),
        ({"a": "${model.args}"}, "model.args"),
        ({"a": "x${model.args.b}", "b": "${model.args.c}", "c": "${model.args.b}"}, "model.args.b -> model.args.c"),
        ({"a": {"b": "${model.args.a}"}}, "model.args.a"),
    ],
)
def test_a_circle_is_reported_and_not_followed(args: dict[str, Any], circle: str) -> None:
    problems = problems_of(args)
    assert all("a circle of references" in problem.problem for problem in problems)
    assert any(circle in problem.problem for problem in problems)


@pytest.mark.parametrize(
    ("value", "found", "do"),
    [
        ("${run.sed}", "${run.sed} refers to a key that this config does not set", "did you mean 'run.seed'"),
        ("${runn}", "refers to a key that this config does not set", ""),
        ("${rn.seed}", "refers to a key that this config does not set", "did you mean 'run.seed'"),
        ("${model.args.list}/x", "not a single value", "refer to one of its keys"),
        ("${run.seed", "is not closed", "write ${section.key}"),
        ("${model.args.list.9}", "refers to a key that this config does not set", ""),
        ("${}", "refers to a key that this config does not set", ""),
    ],
)
def test_a_reference_to_a_missing_key_is_reported_with_its_key(value: str, found: str, do: str) -> None:
    (problem,) = problems_of({"a": {"b": value}, "list": [1]})
    assert (problem.key, problem.where) == ("model.args.a.b", "argument")
    assert found in problem.problem
    assert do in problem.fix


def test_a_typed_key_reads_the_type_behind_the_reference() -> None:
    assert load_config({"run": {"seed": 4, "steps": "${run.seed}"}}).run.steps == 4
    with pytest.raises(ConfigProblemsError, match=r"run\.steps.*\n.*'x': not a number"):
        load_config({"run": {"name": "x", "steps": "${run.name}"}})
