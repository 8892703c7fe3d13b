"""Reading YAML: the line of every key, plain values only, and strict where YAML is lax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disttrain.config import ConfigProblem, ConfigProblemsError, load_config
from disttrain.config.files.yaml_lines import parse_document, parse_value


def read(text: str) -> Any:
    document = parse_document(text, "c.yaml")
    assert document.problems == []
    return document.value


def problems_of(text: str) -> list[ConfigProblem]:
    try:
        return parse_document(text, "c.yaml").problems
    except ConfigProblemsError as error:
        return list(error.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("+.5e1", 5.0),
        ("3.0e-4", 3e-4),
        ("1e", "1e"),
        ("e4", "e4"),
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31 10:00:00", "2026-01-31 10:00:00"),
        ("=", "="),
        ("12", 12),
        ("0x1F", 31),
        ("'12'", "12"),
        ("~", None),
        ("yes", True),
        (".inf", float("inf")),
        ("!!str 5", "5"),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("{2026-01-31: 1}", {"2026-01-31": 1}),
    ],
)
def test_a_value_is_one_of_jsons_kinds_in_files_and_overrides(text: str, value: Any) -> None:
    for found in (read(f"key: {text}")["key"], parse_value(text)):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "line", "found"),
    [
        ("a: 1\nb: 2\na: 3", "a", 3, "the key of line 1 again"),
        ("a: {b: 1,\n    b: 2}", "a.b", 2, "the key of line 1 again"),
        ("a: 1\n5: x", "5", 2, "YAML does not read the key 5 as text"),
        ("true: 1", "true", 1, "YAML does not read the key true as text"),
        ("? [a]\n: 1", "(sequence)", 1, "YAML does not read the key (sequence) as text"),
        ("a:\n  b: !!python/name:os.system x", "a.b", 2, "the tag tag:yaml.org,2002:python/name:os.system"),
        ("a: !!binary aGk=", "a", 1, "the tag tag:yaml.org,2002:binary"),
        ("a: !!timestamp 2026-01-31", "a", 1, "the tag tag:yaml.org,2002:timestamp"),
        ("a: !!set {b}", "a", 1, "the tag tag:yaml.org,2002:set"),
        ("a: !mine [1]", "a", 1, "the tag !mine"),
        ("a: !!int x", "a", 1, "'x' is not a value of type int"),
        ("a: !!bool perhaps", "a", 1, "'perhaps' is not a value of type bool"),
        ("a: &x [*x]", "a.0", 1, "an anchor that contains itself"),
    ],
)
def test_values_of_other_kinds_are_faults_with_key_and_line(text: str, key: str, line: int, found: str) -> None:
    (problem,) = problems_of(text)
    assert (problem.key, problem.where) == (key, f"c.yaml:{line}")
    assert found in problem.problem


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3", 3),
        ("a: 1\n\tb: 2", 2),
        ("a: 1\n---\nb: 2", 2),
        ("a: 1\nb: *nothing", 2),
        ("a: 1\nb: 'x", 2),
        ("a: 1\nb: \x07", 2),
        ("a: b: c", 1),
        ("[" * 5000, 1),
    ],
)
def test_invalid_yaml_is_one_fault_with_its_line(text: str, line: int) -> None:
    (problem,) = problems_of(text)
    assert (problem.key, problem.where) == ("", f"c.yaml:{line}")
    assert "not YAML" in problem.problem or "nested too deep" in problem.problem


def test_every_key_has_its_own_line() -> None:
    lines = parse_document("a:\n  b: 1\n\n  c:\n  - d: 2\n  - e: |\n      x\n    f: 3\n", "c.yaml").lines
    expected = {("a",): 1, ("a", "b"): 2, ("a", "c"): 4, ("a", "c", 0, "d"): 5, ("a", "c", 1, "e"): 6}
    assert {key: lines[key] for key in expected} == expected
    assert lines[("a", "c", 1, "f")] == 8


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfrun: {seed: 3}\n", b"run:\r\n  seed: 3\r\n", b"run: {seed: 3}"])
def test_files_as_other_systems_write_them_are_read(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(raw)
    assert load_config(tmp_path / "c.yaml").run.seed == 3


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.write_bytes(b"run: {name: caf\xe9}"), "is not UTF-8 text"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text(""), "an empty file"),
        (lambda path: path.write_text("# only this\n"), "an empty file"),
        (lambda path: path.write_text("just text"), "a str, not a mapping"),
        (lambda path: path.write_text("- run"), "a list, not a mapping"),
        (lambda path: None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_config_is_one_fault(tmp_path: Path, make: Any, found: str) -> None:
    path = tmp_path / "c.yaml"
    make(path)
    with pytest.raises(ConfigProblemsError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert found in problem.problem and str(path) in problem.where + problem.problem


@pytest.mark.parametrize(
    ("value", "do"),
    [("2.5", "quote it: '2.5'"), ("no", "quote it: YAML reads yes, no, on and off"), ("[a]", "write text")],
)
def test_text_that_yaml_reads_as_something_else_is_reported_with_the_quoted_form(value: str, do: str) -> None:
    with pytest.raises(ConfigProblemsError) as caught:
        load_config({}, [f"run.name={value}"])
    assert do in caught.value.problems[0].fix


@pytest.mark.parametrize("value", ["true", "'10'", "10.5", "1e400", "[1]", "ten", "0", "-1"])
def test_a_number_of_steps_is_a_positive_integer_of_no_other_type(value: str) -> None:
    with pytest.raises(ConfigProblemsError) as caught:
        load_config({}, [f"run.steps={value}"])
    assert [problem.key for problem in caught.value.problems] == ["run.steps"]
    assert load_config({}, ["run.steps=1e3"]).run.steps == 1000
