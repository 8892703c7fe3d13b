"""Maps a single tensor that torch.save wrote into a part of a file, without copying it."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.formats.restricted_pickle import Unpickler, rejection
from disttrain.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {f"torch.{name}": getattr(torch, name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _View:
    """The arguments of a pickled tensor: the part of a storage that it covers. The storage is not read yet."""

    def __init__(self, storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> None:
        self.dtype, self.key, self.count = storage
        self.offset, self.shape, self.stride = offset, tuple(shape), tuple(stride)
        if len(rest) > 2:  # newer dtypes: untyped bytes, and the dtype after the hooks
            self.dtype = rest[2]
            self.count //= self.dtype.itemsize


ALLOWED: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _View,
    "torch._utils._rebuild_tensor_v3": _View,
    "torch._utils._rebuild_parameter": lambda view, *rest: view,
    "torch.Size": torch.Size,
    "collections.OrderedDict": dict,
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **DTYPES,
}


class _Unpickler(Unpickler):
    def persistent_load(self, found: Any) -> Any:
        kind, dtype, key, _, count = found
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        return dtype, str(key), int(count)


class _Window(io.RawIOBase):
    """A part of a mapped file, with the interface of a file."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def mapped_tensor(path: Path, window: memoryview) -> Tensor:
    """Return the tensor that torch.save wrote into these bytes of `path`, as a view of them. Local.

    Raises CheckpointError for anything but a dense tensor, and for a tensor that exceeds its bytes.
    """
    try:
        return _mapped(window)
    except CheckpointError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise rejection(path, problem, "the file is damaged or has no dense tensor: use an intact file") from error


def _mapped(window: memoryview) -> Tensor:
    with zipfile.ZipFile(_Window(window)) as record:
        entries = {entry.filename.partition("/")[2]: entry for entry in record.infolist()}
        view = _Unpickler(record.read(entries["data.pkl"]), ALLOWED).load()
    if not isinstance(view, _View):
        raise ValueError(f"it contains a {type(view).__name__} instead of a tensor")
    if not view.count:
        return torch.empty(view.shape, dtype=view.dtype)
    entry = entries[f"data/{view.key}"]
    begin = entry.header_offset
    sizes = window[begin + 26 : begin + 30]  # the lengths of the local header's name and extra field
    begin += 30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
    if entry.compress_type != zipfile.ZIP_STORED or begin + view.count * view.dtype.itemsize > len(window):
        raise ValueError("its data exceeds the file")
    held = window[begin : begin + view.count * view.dtype.itemsize]
    if zlib.crc32(held) != entry.CRC:  # torch does not check it
        raise ValueError(f"its data has the checksum {zlib.crc32(held):08x} instead of {entry.CRC:08x}")
    # as_strided checks shape, strides and offset against the storage.
    storage = torch.frombuffer(window, dtype=view.dtype, count=view.count, offset=begin)
    return storage.as_strided(view.shape, view.stride, view.offset)
