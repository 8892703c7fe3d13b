"""What a target's text says before anything is looked for: short names, import paths, where targets stand. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.faults import suggest
from disttrain.config.names import NAMES
from disttrain.errors import ConfigError, explain

_SECTIONS = ("model", "objective", "data", "eval", "optim", "schedule", "report")


def section_of(path: tuple[Any, ...]) -> str:
    """Whose short names count at `path`: evaluation sets are data; nested targets have import paths only."""
    return {"eval": "data", "report": "trackers"}.get(str(path[0]), str(path[0]))


def targets_in(values: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], str, Mapping[str, Any]]]:
    """(path, target, args) of every target in a config's values, nested ones too."""
    for section in _SECTIONS:
        yield from _targets(values.get(section), (section,))


def _targets(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if isinstance(value.get("target"), str):
            yield path, value["target"], _mapping(value.get("args"))
        for key, item in value.items():
            yield from _targets(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _targets(item, (*path, index))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def import_path(target: str, section: str) -> str:
    """A short name's import path; anything else as it is. Raises ConfigError for a bare word that is no short name."""
    names = NAMES.get(section, {})
    if target in names:
        return names[target]
    if ":" not in target and "." not in target:
        raise ConfigError(
            explain(
                f"{section}.target={target!r} is to name a part.",
                f"no short name of the section {section!r}",
                suggest(target, names) + "; or write package.module:attribute",
            )
        )
    return target


def splits_of(path: str) -> list[tuple[str, str]]:
    """(module, attribute) as `path` may be read: one way with a colon, else every dot, longest module first. Pure."""
    if ":" in path:
        module, _, attribute = path.partition(":")
        return [(module, attribute)]
    parts = path.split(".")
    return [(".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts) - 1, 0, -1)]
