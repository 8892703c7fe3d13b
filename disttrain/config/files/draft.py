"""Merges files, what they extend, and overrides into a draft of a config, with the source of each value.

Imports no user code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from disttrain.config.files.yaml_lines import KeyPath, parse_document, parse_value
from disttrain.config.problems import ConfigProblem, ConfigProblemsError, dotted, shown
from disttrain.config.schema import Config


@dataclass
class Draft:
    """The values of a config before validation. `name` is the location of problems that belong to no key."""

    name: str
    folder: Path
    value: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """The source of the value at `path`, or else of the innermost value that contains it."""
        for length in range(len(path), 0, -1):
            found = self.sources.get(dotted(path[:length]))
            if found is not None:
                return found
        return self.name

    def add_problem(self, path: KeyPath, problem: str, fix: str) -> None:
        """Record a problem of the value at `path`."""
        self.problems.append(ConfigProblem(dotted(path), self.where(path), problem, fix))


def begin_draft(source: str | Path | Mapping[str, Any] | Config) -> Draft:
    """Make a draft from a file and those that it extends, a mapping, or a finished config. Local; reads the disk."""
    if isinstance(source, Config):
        values = {key: value for key, value in source.values().items() if value is not None}
        return Draft("argument", source.folder, values, dict(source.sources))
    if isinstance(source, Mapping):
        draft = Draft("argument", Path.cwd())
        _merge(draft, source, (), lambda path: "argument")
        return draft
    path = Path(source)
    draft = Draft(f"{path}:1", path.resolve().parent)
    try:
        _read_file(draft, path, (), ConfigProblem("", str(path), "", "name a YAML file"))
    except ConfigProblemsError as error:  # ends the chain of files; the problems of those already read are kept
        raise ConfigProblemsError([*draft.problems, *error.problems]) from None
    return draft


def _read_file(draft: Draft, path: Path, chain: tuple[Path, ...], asked: ConfigProblem) -> None:
    """Merge a file over the one that it extends. `asked` is the key and the place that name the file."""
    if path.resolve() in chain:
        circle = " -> ".join(one.name for one in (*chain, path))
        raise ConfigProblemsError(
            [ConfigProblem(asked.key, asked.where, f"a circle: {circle}", "remove `extends` from one of them")]
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigProblemsError(
            [ConfigProblem(asked.key, asked.where, _unreadable(path, error), asked.fix)]
        ) from None
    document = parse_document(text, str(path))
    draft.problems += document.problems
    if not isinstance(document.value, Mapping):
        kind = type(document.value).__name__
        problem = "an empty file" if document.value is None else f"a {kind}, not a mapping"
        fix = "write sections: run, model, objective, data, optim, ..."
        raise ConfigProblemsError([ConfigProblem("", f"{path}:1", problem, fix)])
    value = dict(document.value)
    base = value.pop("extends", None)
    if base is not None:
        where = f"{path}:{document.lines.get(('extends',), 1)}"
        fix = "write the path of one file, relative to this file"
        if not isinstance(base, str):
            raise ConfigProblemsError([ConfigProblem("extends", where, shown(base), fix)])
        _read_file(draft, path.parent / base, (*chain, path.resolve()), ConfigProblem("extends", where, "", fix))
    _merge(draft, value, (), lambda at: f"{path}:{document.lines.get(at, 1)}")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder"
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is not UTF-8 text: {error}"
    reason = getattr(error, "strerror", None) or str(error)
    here = "" if path.is_absolute() else f" (the working directory is {Path.cwd()})"
    return f"{path} cannot be read: {reason}{here}"


def _merge(draft: Draft, value: Mapping[str, Any], path: KeyPath, source: Callable[[KeyPath], str]) -> None:
    """Merge `value` into the draft at `path`. Another `target` removes the previous target's `args`."""
    section = draft.value
    for key in path:
        section = section[key] if isinstance(section, list) else section.setdefault(str(key), {})
    if "target" in value and section.get("target") not in (None, value["target"]):
        section.pop("args", None)
        _forget(draft, (*path, "args"))
    for name, item in value.items():
        key = str(name)
        here = (*path, key)
        if isinstance(item, Mapping) and isinstance(section.get(key), Mapping | None):
            if not isinstance(section.get(key), dict):
                section[key] = {}
            draft.sources[dotted(here)] = source(here)
            _merge(draft, item, here, source)
        else:
            _forget(draft, here)
            section[key] = item
            for inner in (here, *_paths_in(item, here)):
                draft.sources[dotted(inner)] = source(inner)


def _paths_in(value: Any, path: KeyPath) -> Iterable[KeyPath]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths_in(item, (*path, key))


def _forget(draft: Draft, path: KeyPath) -> None:
    key = dotted(path)
    for one in [one for one in draft.sources if one == key or one.startswith(key + ".")]:
        del draft.sources[one]


def apply_overrides(draft: Draft, overrides: Any) -> None:
    """Merge overrides into the draft: `section.key=value` strings, (key, value) pairs, or a mapping of those. Local.

    Targets are merged first, so that arguments of a new target are not removed with those of the previous one. A
    mapping is merged into the mapping that it overrides; any other value replaces it.
    """
    listed = list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
    parsed = [one for one in (_parse_override(draft, override) for override in listed) if one is not None]
    for key, value, source in sorted(parsed, key=lambda one: not one[0].endswith(".target")):
        _apply(draft, key, value, source)


def _parse_override(draft: Draft, override: Any) -> tuple[str, Any, str] | None:
    if not isinstance(override, str):
        return str(override[0]), override[1], "argument"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        problem = f"{shown(override)} is not section.key=value"
        draft.problems.append(ConfigProblem(key, "override", problem, "write e.g. run.steps=20"))
        return None
    try:
        return key, parse_value(text), "override"
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        reason = str(getattr(error, "problem", None) or error).split("\n")[0]
        problem = f"{shown(text, key)} is not YAML: {reason}"
        fix = "write a YAML value; if it is text, quote it once more"
        draft.problems.append(ConfigProblem(key, "override", problem, fix))
        return None


def _apply(draft: Draft, key: str, value: Any, source: str) -> None:
    parts: list[Any] = key.split(".")
    item = 0  # how many parts lead to the innermost item of a list
    section: Any = draft.value
    for at, part in enumerate(parts[:-1], start=1):
        holder, section = section, section.get(part) if section else None
        if isinstance(section, list) and at < len(parts) - 1 and _is_item(section, parts[at]):
            section = holder[part] = [*map(_copied, section)]  # a copy, because the list belongs to the user
            parts[at], item = int(parts[at]), at + 1
            section = dict(enumerate(section))
        elif section is not None and not isinstance(section, Mapping):
            problem = f"{dotted(parts[:at])} is {shown(section, part)}, which has no key {parts[at]!r}"
            fix = f"override the complete value: {dotted(parts[:at])}=..."
            draft.problems.append(ConfigProblem(key, source, problem, fix))
            return
    nested: Any = value
    for part in reversed(parts[item:]):
        nested = {part: nested}
    _merge(draft, nested, tuple(parts[:item]), lambda at: source)


def _is_item(listed: list[Any], part: str) -> bool:
    return part.isdecimal() and int(part) < len(listed) and isinstance(listed[int(part)], Mapping)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [*map(_copied, value)] if isinstance(value, list) else value
