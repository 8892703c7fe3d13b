"""The base of every class that describes a part of a config: frozen, unknown keys refused, no number in disguise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

# What pydantic's errors carry from a validator of ours: "found; to do".
PARTS = "; "


class Section(BaseModel):
    """Base of all sections and options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_disguise(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no 1 and `'10'` is no 10, which pydantic alone would take."""
        if not isinstance(value, bool | str) or info.field_name not in cls.model_fields:
            return value
        kinds = set(kinds_of(cls.model_fields[info.field_name].annotation))
        if type(value) not in kinds and kinds & {int, float}:
            raise ValueError(f"no number{PARTS}write a number, without quotes")
        return value


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The classes in an annotation, seen through unions, containers and literals. Pure."""
    if get_origin(annotation) is Literal:
        yield from (type(word) for word in get_args(annotation))
    elif get_args(annotation):
        for inner in get_args(annotation):
            yield from kinds_of(inner)
    else:
        yield annotation
