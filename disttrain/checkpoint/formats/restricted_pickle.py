"""Reads pickles of other libraries without running them. Only classes on an explicit list are made, as plain fields.

There are two entry points. A file of torch.save is read by torch's restricted unpickler, with this list added to
torch's. A bare pickle is read by `Unpickler`, which looks up every name in a table and nowhere else. Any other name is
rejected before anything of it is called, and the error states the name.
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
"""The replacement of `module.name` in a pickle: a callable without effect, or a class that only has fields."""


class StandIn:
    """Replaces a class of another library. Keeps the pickled state and runs nothing."""

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, Mapping) else {"state": state}

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)


def stand_in_class(name: str) -> type[StandIn]:
    """Return a new class for the class that it replaces. Pure."""
    return type(name, (StandIn,), {})


class Unpickler(pickle.Unpickler):
    """An unpickler that can only reach the names in a table."""

    def __init__(self, content: bytes, allowed: Allowed) -> None:
        super().__init__(io.BytesIO(content))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement, never the named object itself."""
        wanted = f"{module}.{name}"
        if wanted not in self._allowed:
            raise pickle.UnpicklingError(f"it needs {wanted}")
        return self._allowed[wanted]


def read_pickle(path: Path, allowed: Allowed) -> Any:
    """Return the content of a bare pickle, with replacements. Local.

    Raises CheckpointError that states any other name in the pickle.
    """
    try:
        return Unpickler(path.read_bytes(), allowed).load()
    except OSError as error:
        raise rejection(path, str(error.strerror), "make it readable") from error
    except Exception as error:
        raise rejection(path, f"{type(error).__name__}: {error}", _SAVE_PLAIN_VALUES) from error


def load_torch_file(path: Path, allowed: Allowed | None = None) -> Any:
    """Return the content of a file of torch.save, with mapped tensors if the file's form allows it. Local.

    Raises CheckpointError as `read_pickle` does.
    """
    if not path.is_file():
        raise rejection(
            path, "no such file" if not path.exists() else "not a regular file", "name a file of torch.save"
        )
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 cannot be mapped
        if path.suffix == ".safetensors":  # torch would decide by this suffix, whatever the content is
            file.seek(0)
            return load_torch(path, file, allowed)
    return load_torch(path, str(path), allowed, mapped=mapped)


def reject_corrupt_zip(path: Path) -> None:
    """Raise CheckpointError if bytes of a torch.save file do not match their checksums, which torch ignores.

    Files from before torch 1.6 have no checksums. Reads the complete file. Local.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        corrupt = f"{type(error).__name__}: {error}"
    if corrupt is not None:
        raise rejection(path, f"{corrupt}: its checksum differs from the stored one", SAVE_AGAIN)


SAVE_AGAIN = (
    "use another copy. A file written under torch.serialization.set_crc32_options(False) has no valid checksums: "
    "save it again"
)


def load_torch(path: Path, source: Any, allowed: Allowed | None = None, *, mapped: bool = False, **options: Any) -> Any:
    """Return the content of an open file or a part of one, as `load_torch_file`. Errors name `path`."""
    listed: list[Any] = [(stand_in, name) for name, stand_in in (allowed or {}).items()]
    options.setdefault("map_location", "cpu")
    try:
        with torch.serialization.safe_globals(listed), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.load(source, weights_only=True, mmap=mapped, **options)
    except Exception as error:
        raise rejection(path, _rejected_name(error), _SAVE_PLAIN_VALUES) from error


def _rejected_name(error: Exception) -> str:
    """Return torch's message without its advice to run the pickle anyway."""
    text = str(error)
    match = re.search(r"GLOBAL ([\w.]+)", text)
    if match:
        return f"its pickle needs {match.group(1)}, which is neither a tensor nor a plain value"
    detail = text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
    return f"{type(error).__name__}: {' '.join(detail.split())[:300]}"


_SAVE_PLAIN_VALUES = (
    "nothing in it was run. Save the state again as tensors, numbers, text, lists and mappings only, "
    "on a machine that trusts the file"
)


def rejection(path: Path, problem: str, fix: str) -> CheckpointError:
    """Return the error for a pickle that was not read."""
    return CheckpointError(explain(f"Cannot read {path} with the restricted loader for pickles.", problem, fix))
