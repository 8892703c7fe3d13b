"""Renders a resolved config for people and programs: plain values with their sources, secrets redacted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.files.yaml_lines import write_value
from disttrain.config.schema import Config


def render_config(config: Config) -> str:
    """YAML that reads back to the same config. A comment gives the source of each value; secrets are redacted. Pure."""
    lines: list[str] = []
    _render(config.to_dict(), (), config.sources, lines)
    return "\n".join(lines) + "\n"


def _render(value: Mapping[str, Any], path: tuple[str, ...], sources: Mapping[str, str], lines: list[str]) -> None:
    pad = "  " * len(path)
    for name, item in value.items():
        here = (*path, name)
        key = write_value(name)
        if isinstance(item, Mapping) and item:
            lines.append(f"{pad}{key}:")
            _render(item, here, sources, lines)
            continue
        text = write_value(item)
        lines.append(f"{pad}{key}: {text}  # {source_of(here, sources)}")


def every_source(config: Config) -> dict[str, str]:
    """The source of every value by its dotted key. The source is `default` where nothing set the value. Pure."""
    return {".".join(path): source_of(path, config.sources) for path in _leaves(config.to_dict(), ())}


def _leaves(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, (*path, name))
        else:
            yield (*path, name)


def source_of(path: tuple[str, ...], sources: Mapping[str, str]) -> str:
    """The source of the value at `path`, or else of the innermost value that contains it. Pure."""
    for length in range(len(path), 1, -1):
        found = sources.get(".".join(path[:length]))
        if found is not None:
            return found
    return sources.get(path[0], "default") if len(path) == 1 else "default"
