"""Where checkpoints lie: a folder on a disk, or an address in a store, and the names that they have there.

Pure. `Address` is to a store what a Path is to a disk: as much of one as this room and its callers use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::)")
_ON_DISK = ("file://", "local://")
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, order=True)
class Address:
    """A folder or file in a store: `s3://bucket/prefix/step-00000100`. Not a PathLike: nothing opens it by mistake."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """The folder it lies in."""
        return Address(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> Address:
        """Beside it."""
        return self.parent / name

    def resolve(self) -> Address:
        """Itself: a store has no links and no working directory."""
        return self


Place: TypeAlias = Path | Address
PlaceT = TypeVar("PlaceT", bound=Place)


def place_of(where: str | Place) -> Place:
    """What a user wrote, as a place: `PROTOCOL://...` is an address, `file://` and all else a path."""
    if not isinstance(where, str):
        return where
    for prefix in _ON_DISK:
        if where.startswith(prefix):
            return Path(where.removeprefix(prefix))
    return Address(where) if _URL.match(where) else Path(where)


def below(folder: PlaceT, name: str) -> PlaceT:
    """`folder / name`, of the folder's own kind."""
    return cast(PlaceT, folder / name)


def beside(place: PlaceT, name: str) -> PlaceT:
    """`place.with_name(name)`, of the place's own kind."""
    return cast(PlaceT, place.with_name(name))


def step_folder(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    if step < 0:
        raise ValueError(f"a step is not negative: {step}")
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint a folder of that name holds; None for another name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None
