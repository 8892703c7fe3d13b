"""Pickles of others, read without running them: only classes on an explicit list are made, and those as plain records.

Two doors: torch.save files go through torch's own restricted unpickler with our list beside its own; a bare pickle goes
through `Unpickler`, whose every name is looked up in a table and nowhere else. Whatever else a pickle asks for is
refused by its name, before anything of it is called.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from disttrain.errors import CheckpointError, explain

Allowed = Mapping[str, Any]
"""What stands in for `module.name` in a pickle: a callable without effect, or a class made of its fields alone."""


class StandIn:
    """Stands in for a class of others: keeps the state that was pickled, runs nothing."""

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, Mapping) else {"state": state}

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)


def stand_in_class(name: str) -> type[StandIn]:
    """A class of its own for each class that it stands in for. Pure."""
    return type(name, (StandIn,), {})


class Unpickler(pickle.Unpickler):
    """A bare pickle, with nothing in reach but a table."""

    def __init__(self, content: bytes, allowed: Allowed) -> None:
        super().__init__(io.BytesIO(content))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in, never the thing itself."""
        wanted = f"{module}.{name}"
        if wanted not in self._allowed:
            raise pickle.UnpicklingError(f"it wants {wanted}")
        return self._allowed[wanted]


def read_pickle(path: Path, allowed: Allowed) -> Any:
    """What a bare pickle holds, as stand-ins. Local; raises CheckpointError that names what else it wants."""
    try:
        return Unpickler(path.read_bytes(), allowed).load()
    except OSError as error:
        raise refusal(path, str(error.strerror), "make it readable") from error
    except Exception as error:
        raise refusal(path, f"{type(error).__name__}: {error}", _DO) from error


def load_torch_file(path: Path, allowed: Allowed | None = None) -> Any:
    """What a file of torch.save holds, its tensors mapped where its form allows. Local; CheckpointError as above."""
    if not path.is_file():
        raise refusal(path, "no such file" if not path.exists() else "no regular file", "name a file of torch.save")
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # the form before torch 1.6 cannot be mapped
        if path.suffix == ".safetensors":  # a name by which torch would go, whatever is in it
            file.seek(0)
            return load_torch(path, file, allowed)
    return load_torch(path, str(path), allowed, mapped=mapped)


def reject_corrupt_zip(path: Path) -> None:
    """Raise CheckpointError where a torch.save file's bytes do not fit their checksums, which torch does not look at.

    The form before torch 1.6 has none. Reads the whole file. Local.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            rotten = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        rotten = f"{type(error).__name__}: {error}"
    if rotten is not None:
        raise refusal(path, f"{rotten}: another checksum than stored", ROTTEN)


ROTTEN = (
    "use another copy. Written under torch.serialization.set_crc32_options(False) it never had good ones: save it anew"
)


def load_torch(path: Path, source: Any, allowed: Allowed | None = None, *, mapped: bool = False, **options: Any) -> Any:
    """The same of an open file or a part of one; `path` names it in errors."""
    listed: list[Any] = [(stand_in, name) for name, stand_in in (allowed or {}).items()]
    options.setdefault("map_location", "cpu")
    try:
        with torch.serialization.safe_globals(listed), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.load(source, weights_only=True, mmap=mapped, **options)
    except Exception as error:
        raise refusal(path, _wanted(error), _DO) from error


def _wanted(error: Exception) -> str:
    """What torch says of it, without its advice to run the pickle after all."""
    text = str(error)
    match = re.search(r"GLOBAL ([\w.]+)", text)
    if match:
        return f"its pickle wants {match.group(1)}, which is neither a tensor nor a plain value"
    detail = text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
    return f"{type(error).__name__}: {' '.join(detail.split())[:300]}"


_DO = (
    "nothing in it was run. Save the state as tensors, numbers, text, lists and mappings only, "
    "where it was made and is trusted"
)


def refusal(path: Path, found: str, do: str) -> CheckpointError:
    """The error of a pickle that was not read."""
    return CheckpointError(explain(f"{path} is a pickle and is read by a restricted loader only.", found, do))
