"""Looks up keys in the schema: which exist, where a path of keys leads, and which default it has. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.schema import Config


def members(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation: a union's members, else itself."""
    if get_origin(annotation) in (Union, UnionType):
        for inner in get_args(annotation):
            yield from members(inner)
    else:
        yield annotation


def class_in(annotation: Any) -> type[BaseModel] | None:
    """The class of the section that an annotation names, or None."""
    return next((one for one in members(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)


def item_of(annotation: Any) -> Any:
    """The annotation of a mapping's values or a list's items, or Any."""
    for one in members(annotation):
        if get_origin(one) is dict:
            return get_args(one)[1]
        if get_origin(one) in (tuple, list):
            return get_args(one)[0]
    return Any


def locate(loc: KeyPath, value: Any, annotation: Any) -> tuple[KeyPath, list[str]]:
    """Translate pydantic's location, in which unions insert extra names, to a path in the data.

    Also returns the keys that the schema knows at that path.
    """
    path: list[str | int] = []
    known: list[str] = []
    for part in loc:
        section = class_in(annotation)
        if isinstance(value, Mapping) and section is not None and (part in value or part in section.model_fields):
            known = list(section.model_fields)
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field is not None else Any
        elif (isinstance(value, Mapping) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            known, annotation = [], item_of(annotation)
        else:
            continue
        path.append(part)
        value = value.get(part) if isinstance(value, Mapping) else value[part]
    return tuple(path), known


def known_keys() -> list[str]:
    """Every `section.key` of the schema."""
    found = []
    for name, field in Config.model_fields.items():
        section = class_in(field.annotation)
        found += [f"{name}.{key}" for key in section.model_fields] if section is not None else []
    return found


def default_at(name: str) -> Any:
    """The default of a dotted key. Raises KeyError where the schema has none."""
    annotation: Any = Config
    default: Any = None
    for part in name.split("."):
        section = class_in(annotation)
        if section is None or part not in section.model_fields or section.model_fields[part].is_required():
            raise KeyError(name)
        annotation = section.model_fields[part].annotation
        default = section.model_fields[part].get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return default.model_dump()
    return list(default) if isinstance(default, tuple) else default
