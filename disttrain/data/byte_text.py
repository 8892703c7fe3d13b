"""`byte_text`: windows over the bytes of a file, a folder, or the Python standard library's own sources.

Owns the choice of files and the split; one gather makes a whole batch, so no worker is needed. Refuses what it cannot
read, and text shorter than one window; leaves out, and says so, what in a folder is no text.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.errors import DataError, explain
from disttrain.logs import package_logger

STDLIB = "python-stdlib"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip", "lib2to3"}
_SPLITS = ("train", "eval", "all")
_LOOKED_AT = 8000
"""Bytes searched for a zero, which makes a file binary (git's rule: buffer_is_binary in xdiff-interface.c)."""


class ByteText:
    """Item i is (inputs, targets), int64 [context] each: bytes i*context to (i+1)*context, and the same one further on.

    `source` is a file, a folder of text files, or `python-stdlib`. Several files are split whole, by a hash of their
    relative path; a single file by position. Windows do not overlap. A folder's hidden and binary files are left out.
    """

    draws_randomness = False

    def __init__(self, source: str, context: int, split: str = "train", eval_share: float = 0.05) -> None:
        if split not in _SPLITS or context < 1 or not 0 < eval_share < 1:
            found = f"split={split!r}, context={context}, eval_share={eval_share}"
            raise DataError(explain("byte_text splits into train, eval or all.", found, "mend these arguments"))
        self.tokens_per_sample = context
        self._context = context
        text, files = _read(source, split, eval_share)
        if len(text) <= context:
            found = f"{len(text)} bytes in the split {split!r} of {source}, which has {files} text file(s)"
            do = "give more text, less context, or another eval_share"
            raise DataError(explain(f"byte_text cuts windows of {context} bytes.", found, do))
        self._bytes = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
        self._offsets = torch.arange(context + 1)

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather_batch([range(len(self))[index]])
        return inputs[0], targets[0]

    def gather_batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 [len(indices), context] each, in one gather."""
        starts = torch.as_tensor(indices, dtype=torch.int64) * self._context
        windows = self._bytes[starts[:, None] + self._offsets].long()
        return windows[:, :-1], windows[:, 1:]


def _read(source: str, split: str, eval_share: float) -> tuple[bytes, int]:
    """The split's bytes, and how many files it was taken from."""
    root, files = _files_of(source)
    if len(files) == 1:
        text = _bytes_of(files[0])
        cut = round(len(text) * (1 - eval_share))
        return {"train": text[:cut], "eval": text[cut:], "all": text}[split], 1
    chosen = [path for path in files if split == "all" or _is_eval(path, root, eval_share) == (split == "eval")]
    return b"".join(_bytes_of(path) for path in chosen), len(files)


def _files_of(source: str) -> tuple[Path, list[Path]]:
    """Where they lie, and the text files in one order on every machine. A file that is named is taken as it is."""
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return root, sorted(path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts))
    root = Path(source).expanduser()
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        found = f"nothing there; the working directory is {Path.cwd()}"
        raise DataError(
            explain(f"byte_text reads {str(source)!r}, a file or a folder.", found, f"mend it, or {STDLIB}")
        )
    shown = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(root))]
    binary = [path for path in shown if b"\0" in _bytes_of(path, _LOOKED_AT)]
    if binary:
        names = ", ".join(str(path.relative_to(root)) for path in binary[:3]) + (", ..." if len(binary) > 3 else "")
        package_logger("data").warning("byte_text leaves out %d binary file(s) of %s: %s", len(binary), root, names)
    return root, [path for path in shown if path not in set(binary)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_eval(path: Path, root: Path, eval_share: float) -> bool:
    return zlib.crc32(os.fsencode(path.relative_to(root).as_posix())) < eval_share * 2**32


def _bytes_of(path: Path, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise DataError(
            explain(f"byte_text reads {path}.", str(error.strerror), "make it readable, or leave it out")
        ) from error
