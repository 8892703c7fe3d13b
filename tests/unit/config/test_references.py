"""`${section.key}`: what it becomes, and what it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.config import ConfigFaultsError, Fault, load_config


def args_of(args: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = load_config({"model": {"target": "builtins:dict", "args": args}, **sections})
    assert config.model is not None
    return config.model.args


def faults_of(args: dict[str, Any], **sections: Any) -> tuple[Fault, ...]:
    with pytest.raises(ConfigFaultsError) as caught:
        args_of(args, **sections)
    return caught.value.faults


@pytest.mark.parametrize("value", [3, 2.5, True, None, "text", "7", [1, [2]], {"a": {"b": 1}}])
def test_a_whole_value_keeps_its_type(value: Any) -> None:
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


def test_it_reads_what_overrides_left(tmp_path: Any) -> None:
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
def test_a_circle_is_told_and_not_walked(args: dict[str, Any], circle: str) -> None:
    faults = faults_of(args)
    assert all("a circle of references" in fault.found for fault in faults)
    assert any(circle in fault.found for fault in faults)


@pytest.mark.parametrize(
    ("value", "found", "do"),
    [
        ("${run.sed}", "${run.sed}, which is set nowhere", "did you mean 'run.seed'"),
        ("${runn}", "which is set nowhere", ""),
        ("${rn.seed}", "which is set nowhere", "did you mean 'run.seed'"),
        ("${model.args.list}/x", "no single value", "refer to one of its keys"),
        ("${run.seed", "does not end", "write ${section.key}"),
        ("${model.args.list.9}", "which is set nowhere", ""),
        ("${}", "which is set nowhere", ""),
    ],
)
def test_a_reference_that_leads_nowhere_is_told_with_its_key(value: str, found: str, do: str) -> None:
    (fault,) = faults_of({"a": {"b": value}, "list": [1]})
    assert (fault.key, fault.where) == ("model.args.a.b", "argument")
    assert found in fault.found
    assert do in fault.do


def test_a_typed_key_reads_the_type_behind_the_reference() -> None:
    assert load_config({"run": {"seed": 4, "steps": "${run.seed}"}}).run.steps == 4
    with pytest.raises(ConfigFaultsError, match=r"run\.steps.*\n.*'x': no number"):
        load_config({"run": {"name": "x", "steps": "${run.name}"}})
