"""Encodes tensors as bytes of a file: the safetensors format, its dtypes, and raw bytes without a copy of the tensor.

The format (https://huggingface.co/docs/safetensors, "Format") is a u64 little-endian header length, a JSON header
padded with spaces, and the raw little-endian data without gaps. All functions are pure, except that `tensor_bytes`
copies from the device.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, flat_range_to_boxes
from disttrain.errors import CheckpointError, explain

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.complex128: "F64",  # the format has no C128: written as pairs, see `_stored_form`
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _SAFETENSORS}

ALIGNMENT = 64
"""Data begins at a multiple of this number of bytes, so that no element spans two checksum chunks."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the manifest, which is torch's name.

    Raises CheckpointError for a dtype that cannot be stored.
    """
    if dtype not in _SAFETENSORS:
        raise CheckpointError(
            explain(
                f"Cannot save a tensor of {dtype}.", f"{dtype} has no form on disk", f"use one of {', '.join(_NAMES)}"
            )
        )
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name. Raises ValueError for an unknown name."""
    if name not in _NAMES:
        raise ValueError(f"unknown dtype {str(name)[:40]!r}; known dtypes are {', '.join(_NAMES)}")
    return _NAMES[name]


@dataclass(frozen=True, slots=True)
class Entry:
    """The position of a box in a file. `start` is the offset of its first byte from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.box.numel * self.dtype.itemsize

    @property
    def key(self) -> str:
        """The name of the box in the file."""
        return box_key(self.name, self.shape, self.box)


def box_key(name: str, shape: Sequence[int], box: Box) -> str:
    """Return the name of a box in a file. It is the tensor's name if the box covers the complete tensor."""
    return name if box.sizes == tuple(shape) else f"{name}{box}"


def plan_file(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[Entry]]:
    """Return the first bytes of a file (length and header), and the entries in file order with their positions."""
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for entry in ordered:
        end = begin + entry.box.numel * entry.dtype.itemsize
        header[entry.key] = {**_stored_form(entry.dtype, entry.box), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    placed, start = [], len(head)
    for entry in ordered:
        placed.append(Entry(entry.name, entry.shape, entry.dtype, entry.box, start))
        start = placed[-1].stop
    return head, placed


def _stored_form(dtype: torch.dtype, box: Box) -> dict[str, object]:
    pairs = (2,) if dtype is torch.complex128 else ()
    return {"dtype": _SAFETENSORS[dtype], "shape": [*box.sizes, *pairs]}


class Header:
    """The boxes that a file's header lists. Raises ValueError for a header that `plan_file` cannot produce."""

    def __init__(self, text: bytes, size: int) -> None:
        self._first = 8 + len(text)
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        self._entries = {key: entry for key, entry in content.items() if key != "__metadata__"}
        spans = sorted((*entry["data_offsets"],) for entry in self._entries.values())
        end = 0
        for begin, stop in spans:
            if begin != end or type(stop) is not int or stop < begin:
                raise ValueError(f"the boxes leave a gap or overlap at byte {end} of the data")
            end = stop
        if self._first + end != size:
            raise ValueError(f"the boxes end at byte {self._first + end} of {size}")

    def start(self, name: str, shape: Sequence[int], dtype: torch.dtype, box: Box) -> int:
        """Return the first byte of a box in the file. Raises ValueError if the box is missing or differs."""
        key = box_key(name, shape, box)
        entry = self._entries.get(key)
        if entry is None:
            raise ValueError(f"no {key}")
        begin, stop = entry["data_offsets"]
        found = {kind: entry[kind] for kind in ("dtype", "shape")}
        if found != _stored_form(dtype, box) or stop - begin != box.numel * dtype.itemsize:
            raise ValueError(f"{key} is stored as {found['dtype']} {found['shape']}")
        return self._first + int(begin)


def tensor_bytes(tensor: Tensor, piece_bytes: int) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order.

    A contiguous tensor in host memory is yielded without a copy. Other tensors are copied piece by piece.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        yield raw_bytes(tensor)
        return
    shape = tuple(tensor.shape)
    numel, step = math.prod(shape), max(1, piece_bytes // tensor.dtype.itemsize)
    for start in range(0, numel, step):
        for box in flat_range_to_boxes(shape, start, min(start + step, numel)):
            piece = tensor[box.slices()].resolve_conj().resolve_neg().contiguous()
            yield raw_bytes(piece.cpu())


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, without a copy."""
    # as_strided instead of reshape: a contiguous tensor of one element may have any stride, and has no byte view then.
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)
