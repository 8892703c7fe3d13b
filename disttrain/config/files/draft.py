"""A config on its way: files over what they extend, overrides over files, each value with its source. No user code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from disttrain.config.files.yaml_lines import KeyPath, parse_document, parse_value
from disttrain.config.problems import ConfigFaultsError, Fault, dotted, shown
from disttrain.config.schema import Config


@dataclass
class Draft:
    """Values on their way to a Config. `name` is where a fault stands that has no key of its own."""

    name: str
    folder: Path
    value: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """The source of the value at `path`, or of the nearest thing around it."""
        for length in range(len(path), 0, -1):
            found = self.sources.get(dotted(path[:length]))
            if found is not None:
                return found
        return self.name

    def add_fault(self, path: KeyPath, found: str, do: str) -> None:
        """Note a fault of the value at `path`."""
        self.faults.append(Fault(dotted(path), self.where(path), found, do))


def begin_draft(source: str | Path | Mapping[str, Any] | Config) -> Draft:
    """A draft from a file (and what it extends), a mapping, or a finished config. Reads the disk."""
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
        _read_file(draft, path, (), Fault("", str(path), "", "name a YAML file"))
    except ConfigFaultsError as error:  # the chain ends here; what its other files were found to say wrong stays told
        raise ConfigFaultsError([*draft.faults, *error.faults]) from None
    return draft


def _read_file(draft: Draft, path: Path, chain: tuple[Path, ...], asked: Fault) -> None:
    """Merge a file over what it extends. `asked` is the key and place that named it."""
    if path.resolve() in chain:
        circle = " -> ".join(one.name for one in (*chain, path))
        raise ConfigFaultsError(
            [Fault(asked.key, asked.where, f"a circle: {circle}", "let one of them extend nothing")]
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigFaultsError([Fault(asked.key, asked.where, _unreadable(path, error), asked.do)]) from None
    document = parse_document(text, str(path))
    draft.faults += document.faults
    if not isinstance(document.value, Mapping):
        found = "an empty file" if document.value is None else f"a {type(document.value).__name__}, no mapping"
        do = "write sections: run, model, objective, data, optim, ..."
        raise ConfigFaultsError([Fault("", f"{path}:1", found, do)])
    value = dict(document.value)
    base = value.pop("extends", None)
    if base is not None:
        where = f"{path}:{document.lines.get(('extends',), 1)}"
        do = "write one file's path, relative to this file"
        if not isinstance(base, str):
            raise ConfigFaultsError([Fault("extends", where, shown(base), do)])
        _read_file(draft, path.parent / base, (*chain, path.resolve()), Fault("extends", where, "", do))
    _merge(draft, value, (), lambda at: f"{path}:{document.lines.get(at, 1)}")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder"
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is no UTF-8 text: {error}"
    reason = getattr(error, "strerror", None) or str(error)
    here = "" if path.is_absolute() else f" (the working directory is {Path.cwd()})"
    return f"{path} cannot be read: {reason}{here}"


def _merge(draft: Draft, value: Mapping[str, Any], path: KeyPath, source: Callable[[KeyPath], str]) -> None:
    """Lay `value` over the draft at `path`; another `target` drops the `args` that were there."""
    place = draft.value
    for key in path:
        place = place[key] if isinstance(place, list) else place.setdefault(str(key), {})
    if "target" in value and place.get("target") not in (None, value["target"]):
        place.pop("args", None)
        _forget(draft, (*path, "args"))
    for name, item in value.items():
        key = str(name)
        here = (*path, key)
        if isinstance(item, Mapping) and isinstance(place.get(key), Mapping | None):
            if not isinstance(place.get(key), dict):
                place[key] = {}
            draft.sources[dotted(here)] = source(here)
            _merge(draft, item, here, source)
        else:
            _forget(draft, here)
            place[key] = item
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
    """Lay overrides over the draft: `section.key=value` texts, (key, value) pairs, or a mapping of those.

    Targets go first, so that arguments given beside a new target are not dropped with the old ones. A mapping as a
    value is laid over what is there; anything else replaces it.
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
        found = f"{shown(override)}, which is no section.key=value"
        draft.faults.append(Fault(key, "override", found, "write e.g. run.steps=20"))
        return None
    try:
        return key, parse_value(text), "override"
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        problem = str(getattr(error, "problem", None) or error).split("\n")[0]
        found = f"{shown(text, key)}, which is not YAML: {problem}"
        draft.faults.append(Fault(key, "override", found, "write a YAML value; quote it once more if it is text"))
        return None


def _apply(draft: Draft, key: str, value: Any, source: str) -> None:
    parts: list[Any] = key.split(".")
    item = 0  # how many parts lead to the innermost item of a list
    place: Any = draft.value
    for at, part in enumerate(parts[:-1], start=1):
        holder, place = place, place.get(part) if place else None
        if isinstance(place, list) and at < len(parts) - 1 and _is_item(place, parts[at]):
            place = holder[part] = [*map(_copied, place)]  # the list is the user's own
            parts[at], item = int(parts[at]), at + 1
            place = dict(enumerate(place))
        elif place is not None and not isinstance(place, Mapping):
            found = f"{shown(place, part)} at {dotted(parts[:at])}, which has no key {parts[at]!r}"
            draft.faults.append(Fault(key, source, found, f"override the whole value: {dotted(parts[:at])}=..."))
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
