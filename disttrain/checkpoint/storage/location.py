"""Defines where a checkpoint is stored: a folder on a disk or an address in an object store. Pure.

`Address` offers the part of `pathlib.Path` that the checkpoint package and its callers use.
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
    """A folder or file in an object store, such as `s3://bucket/prefix/step-00000100`.

    It is not an `os.PathLike`, so `open` does not accept it by mistake.
    """

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last component."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """The folder that contains this address."""
        return Address(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> Address:
        """Return the address of that name in the same folder."""
        return self.parent / name

    def resolve(self) -> Address:
        """Return the address itself: an object store has no links and no working directory."""
        return self


Location: TypeAlias = Path | Address
LocationT = TypeVar("LocationT", bound=Location)


def parse_location(where: str | Location) -> Location:
    """Parse a user's text. `PROTOCOL://...` is an address; `file://...` and any other text is a path."""
    if not isinstance(where, str):
        return where
    for prefix in _ON_DISK:
        if where.startswith(prefix):
            return Path(where.removeprefix(prefix))
    return Address(where) if _URL.match(where) else Path(where)


def child(folder: LocationT, name: str) -> LocationT:
    """Return `folder / name` with the type of `folder`."""
    return cast(LocationT, folder / name)


def sibling(location: LocationT, name: str) -> LocationT:
    """Return `location.with_name(name)` with the type of `location`."""
    return cast(LocationT, location.with_name(name))


def step_folder(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    if step < 0:
        raise ValueError(f"a step must not be negative: {step}")
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint folder with that name. Return None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None
