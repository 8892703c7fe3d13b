"""From a file, a mapping and overrides to one validated `Config`: all faults at once, every value's source known.

The order: `extends` chain, the file itself, overrides, `${...}` references, then the schema. Imports no torch and no
user code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from disttrain.config.faults import ConfigFaultsError, Fault, shown, suggest
from disttrain.config.lines import Path as KeyPath
from disttrain.config.lines import parse_document, parse_value
from disttrain.config.schema import Config
from disttrain.config.strategies import BUILT_IN, strategy_entry
from disttrain.config.target_names import import_path, section_of, targets_in
from disttrain.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass
class _Draft:
    """Values on their way to a Config, each leaf with its source."""

    value: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            found = self.sources.get(".".join(map(str, path[:length])))
            if found is not None:
                return found
        return ""


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Any = ()) -> Config:
    """The validated config. `overrides` are `section.key=value` texts, (key, value) pairs, or a mapping of those.

    Raises ConfigFaultsError (a ConfigError) with every fault, where it stands, and what to do.
    """
    draft, folder = _begin(source)
    listed = list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
    for override in listed:
        _apply(draft, override)
    draft.value = _resolve(draft)
    return _validate(draft, folder)


def _begin(source: str | Path | Mapping[str, Any] | Config) -> tuple[_Draft, Path]:
    draft = _Draft()
    if isinstance(source, Config):
        draft.value = {k: v for k, v in source.model_dump().items() if v is not None}
        draft.sources = dict(source.sources)
        return draft, source.folder
    if isinstance(source, Mapping):
        _merge(draft, copy.copy(dict(source)), (), lambda path: "argument")
        return draft, Path.cwd()
    path = Path(source)
    _read_file(draft, path, ())
    return draft, path.resolve().parent


def _read_file(draft: _Draft, path: Path, chain: tuple[Path, ...]) -> None:
    """Merge a file over what it extends."""
    if path.resolve() in chain:
        names = " -> ".join(one.name for one in (*chain, path))
        raise ConfigFaultsError([Fault("extends", str(path), f"a circle: {names}", "let one of them extend nothing")])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        here = f"; the working directory is {Path.cwd()}" if not path.is_absolute() else ""
        raise ConfigFaultsError(
            [Fault("", str(path), f"no readable file: {reason}{here}", "name a YAML file")]
        ) from None
    document = parse_document(text, str(path))
    if not isinstance(document.value, Mapping):
        found = "an empty file" if document.value is None else f"a {type(document.value).__name__}"
        raise ConfigFaultsError(
            [Fault("", str(path), found, "write sections: run, model, objective, data, optim, ...")]
        )
    value = dict(document.value)
    base = value.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            where = f"{path}:{document.lines.get(('extends',), 1)}"
            raise ConfigFaultsError(
                [Fault("extends", where, shown(base), "write one file's path, relative to this file")]
            )
        _read_file(draft, path.parent / base, (*chain, path.resolve()))
    _merge(draft, value, (), lambda at: f"{path}:{document.lines.get(at, 1)}")


def _merge(draft: _Draft, value: Mapping[str, Any], path: KeyPath, source: Any) -> None:
    """Lay `value` over the draft at `path`; another `target` drops the `args` that were there."""
    place = draft.value
    for key in path:
        place = place.setdefault(str(key), {})
    if "target" in value and place.get("target") not in (None, value["target"]):
        place.pop("args", None)
        _forget(draft, (*path, "args"))
    for key, item in value.items():
        here = (*path, key)
        if isinstance(item, Mapping) and isinstance(place.get(key), Mapping | None):
            if not isinstance(place.get(key), dict):
                place[key] = {}
            draft.sources[".".join(map(str, here))] = source(here)
            _merge(draft, item, here, source)
        else:
            _forget(draft, here)
            place[key] = item
            draft.sources[".".join(map(str, here))] = source(here)
            for inner in _leaf_paths(item, here):
                draft.sources[".".join(map(str, inner))] = source(inner)


def _leaf_paths(value: Any, path: KeyPath) -> list[KeyPath]:
    if isinstance(value, Mapping):
        return [inner for key, item in value.items() for inner in ((*path, key), *_leaf_paths(item, (*path, key)))]
    if isinstance(value, list):
        return [inner for i, item in enumerate(value) for inner in ((*path, i), *_leaf_paths(item, (*path, i)))]
    return []


def _forget(draft: _Draft, path: KeyPath) -> None:
    dotted = ".".join(map(str, path))
    for key in [one for one in draft.sources if one == dotted or one.startswith(dotted + ".")]:
        del draft.sources[key]


def _apply(draft: _Draft, override: Any) -> None:
    """One override. A mapping as its value is laid over what is there; anything else replaces it."""
    if isinstance(override, str):
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            draft.faults.append(Fault(override, "override", "no section.key=value", "write e.g. run.steps=20"))
            return
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            draft.faults.append(Fault(key, "override", f"{shown(text)}: {error}".split("\n")[0], "write a YAML value"))
            return
        source = "override"
    else:
        key, value = override
        source = "argument"
    parts = key.strip().split(".")
    place: Any = draft.value
    for part in parts[:-1]:
        if place is not None and not isinstance(place, Mapping):
            found = f"{shown(place)}, which has no key {part!r}"
            draft.faults.append(Fault(key, "override", found, "override the whole value"))
            return
        place = place.get(part) if place else None
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    _merge(draft, nested, (), lambda at: source)


def _resolve(draft: _Draft) -> dict[str, Any]:
    """Replace `${section.key}` by the value there; a whole-value reference keeps its type."""

    def look_up(dotted: str, at: KeyPath, chain: tuple[str, ...]) -> Any:
        if dotted in chain:
            names = " -> ".join((*chain, dotted))
            draft.faults.append(_fault(draft, at, f"a circle of references: {names}", "write one of them out"))
            return None
        value: Any = draft.value
        for part in dotted.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                known = [key for key in draft.sources if key.count(".") == dotted.count(".")]
                found = f"${{{dotted}}}, which is set nowhere in this config"
                draft.faults.append(_fault(draft, at, found, suggest(dotted, known)))
                return None
        return walk(value, at, (*chain, dotted))

    def walk(value: Any, at: KeyPath, chain: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item, (*at, key), chain) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*at, i), chain) for i, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return look_up(whole[1], at, chain)
        return _REFERENCE.sub(lambda match: str(look_up(match[1], at, chain)), value)

    return {key: walk(item, (key,), ()) for key, item in draft.value.items()}


def _fault(draft: _Draft, path: KeyPath, found: str, do: str) -> Fault:
    return Fault(".".join(map(str, path)), draft.where(path), found, do)


def _validate(draft: _Draft, folder: Path) -> Config:
    config: Config | None = None
    strategy = draft.value.get("strategy")
    if isinstance(strategy, Mapping):
        _check_strategies(draft, strategy)
    try:
        config = Config.model_validate(draft.value)
    except ValidationError as error:
        draft.faults += [_translate(draft, one) for one in error.errors()]
    if config is not None and not draft.faults:
        draft.faults += _across_sections(draft, config)
    draft.faults += _unknown_names(draft)
    if draft.faults or config is None:
        raise ConfigFaultsError(draft.faults, (draft.value, draft.sources, folder))
    config._sources = draft.sources
    config._folder = folder
    return config


def _check_strategies(draft: _Draft, strategy: Mapping[str, Any]) -> None:
    """Names that are no strategy, and a plug-in's options by its own class."""
    named = [("name", strategy["name"])] if isinstance(strategy.get("name"), str) else []
    for key, name in [*named, *((key, key) for key in strategy if key != "name")]:
        try:
            entry = strategy_entry(name)
        except ConfigError as error:
            _, found, do = [part.strip() for part in re.split(r"\n  (?:found|to do): ", str(error))]
            draft.faults.append(_fault(draft, ("strategy", key), f"{name!r}: {found}", do))
            continue
        if key != "name" and name not in BUILT_IN:
            try:
                entry.options.model_validate(strategy[key] or {})
            except ValidationError as error:
                draft.faults += [_translate(draft, one, ("strategy", key), entry.options) for one in error.errors()]


def _unknown_names(draft: _Draft) -> list[Fault]:
    """Bare words that are no short name of their section."""
    faults = []
    for path, target, _ in targets_in(draft.value):
        try:
            import_path(target, section_of(path))
        except ConfigError as error:
            found, do = str(error).split("\n  found: ")[1].split("\n  to do: ")
            faults.append(_fault(draft, (*path, "target"), f"{target!r}: {found}", do))
    return faults


def _across_sections(draft: _Draft, config: Config) -> list[Fault]:
    faults = []
    if config.precision.compute == "fp64" and config.strategy.name == "deepspeed":
        do = "set precision.compute=fp32, or use strategy none, ddp or fsdp"
        faults.append(_fault(draft, ("precision", "compute"), "fp64, which deepspeed cannot keep", do))
    if config.precision.compute == "bf16" and config.strategy.name == "deepspeed":
        do = "set precision.compute=fp32, or use strategy none, ddp or fsdp"
        faults.append(_fault(draft, ("precision", "compute"), "bf16 with deepspeed, which comes later", do))
    if config.data is not None and not any((config.run.steps, config.run.epochs, config.run.tokens)):
        found = "none of run.steps, run.epochs, run.tokens"
        faults.append(_fault(draft, ("run", "steps"), found, "say how long to train: run.steps=1000"))
    return faults


def _translate(draft: _Draft, error: Any, prefix: KeyPath = (), model: type[BaseModel] = Config) -> Fault:
    """One of pydantic's errors as a fault in our words."""
    path, known = _real_path(draft.value, (*prefix, *error["loc"]), model if not prefix else None)
    kind, message = error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        return _fault(draft, path, f"the unknown key {str(path[-1])!r}", suggest(str(path[-1]), known))
    if kind == "missing":
        return _fault(draft, path, "nothing", f"add the key {str(path[-1])!r}")
    if kind == "value_error":
        found, _, do = message.removeprefix("Value error, ").partition("; ")
        return _fault(
            draft,
            path,
            f"{shown(error['input'])}: {found}" if not isinstance(error["input"], Mapping) else found,
            do or found,
        )
    if path == ("optim",) and isinstance(error["input"], list):
        return _fault(draft, path, "a list of optimizers, which comes with a later release", "give one optimizer")
    return _fault(draft, path, shown(error["input"]), message[0].lower() + message[1:])


def _real_path(value: Any, loc: KeyPath, model: type[BaseModel] | None) -> tuple[KeyPath, list[str]]:
    """The part of pydantic's location that is in the data (unions add names of their own), and the keys known there."""
    path: list[str | int] = []
    known: list[str] = list(model.model_fields) if model is not None else []
    current: Any = model
    for place, part in enumerate(loc):
        last = place == len(loc) - 1
        inside = (isinstance(value, Mapping) and part in value) or (isinstance(value, list) and isinstance(part, int))
        if not inside and not last:
            continue
        if not inside and last and not (isinstance(value, Mapping) and _is_field(current, part)):
            continue
        known = list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else known
        path.append(part)
        value = value[part] if inside else None
        current = _class_of(current, part)
    return tuple(path), known


def _is_field(current: Any, part: Any) -> bool:
    return isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields


def _class_of(current: Any, part: Any) -> Any:
    """The section class behind a field, seen through unions and containers."""
    if not _is_field(current, part):
        return current if not (isinstance(current, type) and issubclass(current, BaseModel)) else None
    annotation = current.model_fields[part].annotation
    found = [annotation, *_arguments(annotation)]
    return next((one for one in found if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _arguments(annotation: Any) -> Sequence[Any]:
    inner = getattr(annotation, "__args__", ())
    return [*inner, *(deep for one in inner for deep in _arguments(one))]
