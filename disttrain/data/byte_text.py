"""Implements the dataset `byte_text`: windows over the bytes of a file, a folder or the Python standard library.

It selects the files and splits them into training and evaluation text. One gather makes a complete batch, so workers
are not needed. Unreadable files and text shorter than one window are rejected. Binary files in a folder are left out
with a warning.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.errors import DataError, explain
from disttrain.logs import package_logger

STDLIB = "python-stdlib"
_EXCLUDED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "ensurepip",
    "lib2to3",
}
_SPLITS = ("train", "eval", "all")
_PROBED_BYTES = 8000
"""A file with a zero in its first 8000 bytes counts as binary (git's rule: buffer_is_binary in xdiff-interface.c)."""


class ByteText:
    """A map-style dataset whose item i is (inputs, targets), int64 of shape [context] each.

    The inputs are bytes i * context to (i + 1) * context of the text. The targets are the inputs shifted by one byte.
    Windows do not overlap.

    Args:
        source: a file, a folder of text files, or `python-stdlib`. Hidden and binary files of a folder are left out.
        context: bytes per window.
        split: `train`, `eval` or `all`. Each of several files belongs to one split, by a hash of its relative path. A
            single file is split by position.
        eval_share: the share of the `eval` split, between 0 and 1.

    Raises:
        DataError: an argument is invalid, a file cannot be read, or the split is shorter than one window.
    """

    draws_randomness = False

    def __init__(self, source: str, context: int, split: str = "train", eval_share: float = 0.05) -> None:
        if split not in _SPLITS or context < 1 or not 0 < eval_share < 1:
            problem = f"split={split!r}, context={context}, eval_share={eval_share}"
            fix = "set split to train, eval or all, context to at least 1, and eval_share between 0 and 1"
            raise DataError(explain("byte_text has an invalid argument.", problem, fix))
        self.tokens_per_sample = context
        self._context = context
        text, files = _read(source, split, eval_share)
        if len(text) <= context:
            problem = f"{len(text)} bytes in the split {split!r} of {source}, which has {files} text file(s)"
            fix = "provide more text, a smaller context, or another eval_share"
            raise DataError(explain(f"byte_text cannot fill a window of {context} bytes.", problem, fix))
        self._bytes = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
        self._offsets = torch.arange(context + 1)

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather_batch([range(len(self))[index]])
        return inputs[0], targets[0]

    def gather_batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets), int64 of shape [len(indices), context] each, from one gather."""
        starts = torch.as_tensor(indices, dtype=torch.int64) * self._context
        windows = self._bytes[starts[:, None] + self._offsets].long()
        return windows[:, :-1], windows[:, 1:]


def _read(source: str, split: str, eval_share: float) -> tuple[bytes, int]:
    """Return the bytes of the split, and the number of files of `source`."""
    root, files = _files_of(source)
    if len(files) == 1:
        text = _bytes_of(files[0])
        cut = round(len(text) * (1 - eval_share))
        return {"train": text[:cut], "eval": text[cut:], "all": text}[split], 1
    chosen = [path for path in files if split == "all" or _is_eval(path, root, eval_share) == (split == "eval")]
    return b"".join(_bytes_of(path) for path in chosen), len(files)


def _files_of(source: str) -> tuple[Path, list[Path]]:
    """Return the root folder, and the text files in the same order on every machine.

    A `source` that names a file is accepted without the checks of a folder's files.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return root, sorted(_python_files_below(root))
    root = Path(source).expanduser()
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        problem = f"there is no file or folder of this name; the working directory is {Path.cwd()}"
        fix = f"correct the path, or use {STDLIB}"
        raise DataError(explain(f"byte_text cannot read {str(source)!r}.", problem, fix))
    shown = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(root))]
    binary = [path for path in shown if b"\0" in _bytes_of(path, _PROBED_BYTES)]
    if binary:
        names = ", ".join(str(path.relative_to(root)) for path in binary[:3]) + (", ..." if len(binary) > 3 else "")
        package_logger("data").warning("byte_text leaves out %d binary file(s) of %s: %s", len(binary), root, names)
    return root, [path for path in shown if path not in set(binary)]


def _python_files_below(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _EXCLUDED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


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
            explain(
                f"byte_text cannot read {path}.", str(error.strerror), "make it readable, or use a source without it"
            )
        ) from error
