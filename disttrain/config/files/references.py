"""Replaces `${section.key}` by the value of that key.

A value that is only a reference takes the type of the other value. Inside a longer string, the value becomes text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from disttrain.config.files.draft import Draft
from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.key_paths import default_at, known_keys
from disttrain.config.problems import suggest

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_ABSENT = object()


def resolve_references(draft: Draft) -> None:
    """Replace every reference in the draft. Unknown, circular and unclosed references become problems. Local."""
    draft.value = {key: _walk(draft, item, (key,), ()) for key, item in draft.value.items()}


def _walk(draft: Draft, value: Any, at: KeyPath, chain: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _walk(draft, item, (*at, key), chain) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(draft, item, (*at, i), chain) for i, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _look_up(draft, whole[1].strip(), at, chain)
    if "${" in _REFERENCE.sub("", value):
        draft.add_problem(at, f"{value!r} has a reference that is not closed", "write ${section.key}")
        return value
    return _REFERENCE.sub(lambda match: _text(draft, match[1].strip(), at, chain), value)


def _look_up(draft: Draft, name: str, at: KeyPath, chain: tuple[str, ...]) -> Any:
    # A reference to a section that contains it, or to a value whose references lead back to it.
    if name in chain or ".".join(map(str, at)).startswith(name + "."):
        circle = " -> ".join((*chain[chain.index(name) if name in chain else 0 :], name))
        draft.add_problem(at, f"a circle of references: {circle}", "replace one of them by its value")
        return None
    value = _value_at(draft.value, name)
    if value is _ABSENT:
        try:
            return default_at(name)
        except KeyError:
            known = [key for key in [*draft.sources, *known_keys()] if key.count(".") == name.count(".")]
            close_by = [key for key in known if key.partition(".")[0] == name.partition(".")[0]]
            problem = f"${{{name}}} refers to a key that this config does not set"
            draft.add_problem(at, problem, suggest(name, close_by or known))
            return None
    return _walk(draft, value, at, (*chain, name))


def _text(draft: Draft, name: str, at: KeyPath, chain: tuple[str, ...]) -> str:
    value = _look_up(draft, name, at, chain)
    if isinstance(value, Mapping | list):
        draft.add_problem(at, f"${{{name}}} inside a text is not a single value", "refer to one of its keys")
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _value_at(value: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return _ABSENT
    return value
