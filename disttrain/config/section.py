"""Defines the base class of config sections: frozen, without unknown keys, and strict about numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

PARTS = "; "
"""Separates problem and fix in the errors that validators of disttrain's raise through pydantic."""


class Section(BaseModel):
    """Base class of all sections and strategy options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_disguise(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject `true` for 1 and `'10'` for 10, which pydantic alone accepts."""
        if not isinstance(value, bool | str) or info.field_name not in cls.model_fields:
            return value
        kinds = set(kinds_of(cls.model_fields[info.field_name].annotation))
        if type(value) not in kinds and kinds & {int, float}:
            raise ValueError(f"not a number{PARTS}write a number, without quotes")
        return value


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The classes in an annotation, including those inside unions, containers and literals. Pure."""
    if get_origin(annotation) is Literal:
        yield from (type(word) for word in get_args(annotation))
    elif get_args(annotation):
        for inner in get_args(annotation):
            yield from kinds_of(inner)
    else:
        yield annotation
