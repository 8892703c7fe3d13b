"""Validates a draft against schema, rules and names, and reports all problems at once. Imports no user code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from disttrain.config.files.draft import Draft
from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.foreign.deepspeed_native import PLACE, contradictions, read_native, unknown_keys
from disttrain.config.key_paths import known_keys, locate
from disttrain.config.problems import ConfigProblemsError, UnknownNameError, dotted, nearest, shown, suggest
from disttrain.config.rules import broken_rules
from disttrain.config.schema import Config
from disttrain.config.section import PARTS
from disttrain.config.strategy_options import BUILT_IN, TRANSLATED, strategy_entry
from disttrain.config.targets.source_search import find_target_problems
from disttrain.config.targets.target_names import import_path, section_of, targets_in

_ADVICE = {
    "int_type": "write a whole number",
    "int_parsing": "write a whole number",
    "int_from_float": "write a whole number",
    "float_type": "write a number",
    "float_parsing": "write a number",
    "finite_number": "write a finite number",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "tuple_type": "write a list: [a, b]",
    "list_type": "write a list: [a, b]",
    "dict_type": "write a mapping: {key: value}",
    "model_type": "write a mapping, or remove the line",
}


def validate(draft: Draft, needs: Sequence[str] = ()) -> Config:
    """Turn a draft into a Config. Local.

    `needs` are the required sections. Raises ConfigProblemsError with every problem of the draft and, if there is one,
    with those that the sources of its targets show.
    """
    config: Config | None = None
    for broken in broken_rules(draft.value):
        draft.add_problem(*broken)
    for section in needs:
        if draft.value.get(section) is None:
            problem = "the section is missing"
            draft.add_problem((section,), problem, f"add the section {section!r}; only a custom loop may leave it out")
    strategy = draft.value.get("strategy")
    if isinstance(strategy, Mapping):
        _check_strategies(draft, strategy)
        _check_native(draft, strategy)
    try:
        config = Config.model_validate(draft.value)
    except ValidationError as error:
        _translate_all(draft, error, (), Config)
    _check_names(draft)
    if draft.problems or config is None:
        raise ConfigProblemsError([*draft.problems, *find_target_problems(draft.value, draft.sources, draft.folder)])
    return config.placed(draft.sources, draft.folder)


def _check_strategies(draft: Draft, strategy: Mapping[str, Any]) -> None:
    """Check that all names are strategies, and a plug-in's options against their class."""
    name = strategy.get("name")
    named = [("name", name)] if isinstance(name, str) and name != TRANSLATED else []
    for key, name in [*named, *((key, key) for key in strategy if key != "name")]:
        try:
            entry = strategy_entry(name)
        except UnknownNameError as error:
            fix = "did you mean 'name'? " + error.fix if key != "name" and nearest(key, ["name"]) else error.fix
            draft.add_problem(("strategy", key), f"{name!r}: {error.problem}", fix)
            continue
        if key != "name" and name not in BUILT_IN:
            try:
                entry.options.model_validate({} if strategy[key] is None else strategy[key])
            except ValidationError as error:
                _translate_all(draft, error, ("strategy", key), entry.options)


def _check_native(draft: Draft, strategy: Mapping[str, Any]) -> None:
    """Read DeepSpeed's JSON into the resolved config, and compare it with the config if the strategy is deepspeed."""
    options = strategy.get(PLACE[1])
    if not isinstance(options, dict) or options.get(PLACE[2]) is None:
        return
    native, broken = read_native(options[PLACE[2]], draft.folder)
    if isinstance(native, Mapping):
        options[PLACE[2]] = native
        broken += unknown_keys(native)
        if strategy.get("name") == PLACE[1]:
            broken += contradictions(native, draft.value)
    for one in broken:
        draft.add_problem(*one)


def _check_names(draft: Draft) -> None:
    """Check that every target is a short name of its section or an import path."""
    for path, target, _ in targets_in(draft.value):
        try:
            import_path(target, section_of(path))
        except UnknownNameError as error:
            draft.add_problem(path, f"{target!r}: {error.problem}", error.fix)


def _translate_all(draft: Draft, error: ValidationError, prefix: KeyPath, model: type[BaseModel]) -> None:
    value: Any = draft.value
    for part in prefix:
        value = value[part]
    found = []
    for one in error.errors(include_url=False):
        path, known = locate(one["loc"], value, model)
        found.append(((*prefix, *path), known, one))
    for path, known, one in found:
        # A union reports an error for each member. If one member got inside the value, those of the others are noise.
        inside = any(len(other) > len(path) and other[: len(path)] == path for other, _, _ in found)
        if not (inside and isinstance(one["input"], Mapping | list) and str(one["type"]).endswith("_type")):
            draft.add_problem(path, *_translate(path, known, one))


def _translate(path: KeyPath, known: list[str], error: Any) -> tuple[str, str]:
    """The problem and the fix of one of pydantic's errors."""
    kind, key, value = str(error["type"]), str(path[-1]) if path else "", error["input"]
    if kind == "extra_forbidden":
        return f"the unknown key {key!r}", _unknown_key(path, known)
    if kind == "missing":
        return "the key is missing", f"add the key {key!r}"
    if kind == "value_error":
        problem, _, fix = str(error["msg"]).removeprefix("Value error, ").partition(PARTS)
        return f"{shown(value, key)}: {problem}", fix or problem
    return shown(value, key), _advice(kind, path, known, value, error)


def _advice(kind: str, path: KeyPath, known: list[str], value: Any, error: Any) -> str:
    message = str(error["msg"])
    if path == ("version",):
        return "write version: 1, the only version"
    if path and path[-1] == "target":
        return "write a short name or package.module:attribute"
    if kind == "literal_error":
        expected = str(error["ctx"]["expected"])
        near = nearest(str(value), re.findall(r"'([^']*)'", expected))
        return f"did you mean {near!r}? write {expected}" if near is not None else f"write {expected}"
    if kind == "string_type":
        if isinstance(value, bool):
            return "quote it: YAML reads yes, no, on and off as true and false"
        return f"quote it: {str(value)!r}" if isinstance(value, int | float) else "write text"
    if kind in ("model_type", "model_attributes_type") and isinstance(value, str) and path[:1] != ("run",):
        return f"write a mapping: {{target: {value}}}"
    if kind.endswith(("_type", "_parsing")) or kind in _ADVICE:
        return _ADVICE.get(kind, _lower(message))
    return _lower(message).replace("input should be", "write a value")


def _unknown_key(path: KeyPath, known: list[str]) -> str:
    key = str(path[-1])
    if nearest(key, known) is None:
        elsewhere = [one for one in known_keys() if one.partition(".")[2] == key and one != dotted(path)]
        if elsewhere:
            return f"did you mean {elsewhere[0]!r}? {suggest(key, known)}"
        if "args" in known:
            return f"{suggest(key, known)}; arguments of the target belong under args"
    return suggest(key, known)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
