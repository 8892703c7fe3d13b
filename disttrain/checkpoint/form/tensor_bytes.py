"""How tensors lie in a file: the safetensors format, its dtypes, and a tensor's bytes without copying the whole.

Format (https://huggingface.co/docs/safetensors, "Format"): u64 little-endian header length, a JSON header padded with
spaces, then the raw little-endian data without holes. Pure but for `tensor_bytes`, which copies from the device.
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
    torch.complex128: "F64",  # the format has no C128: written as pairs, see `_entry`
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
"""Data begins at a multiple of this, so that no element lies across two checksum chunks."""


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a dtype: torch's own. CheckpointError for one that cannot be stored."""
    if dtype not in _SAFETENSORS:
        raise CheckpointError(
            explain(f"a tensor of {dtype} cannot be saved.", str(dtype), f"use one of {', '.join(_NAMES)}")
        )
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name; ValueError if there is none."""
    if name not in _NAMES:
        raise ValueError(f"dtype {str(name)[:40]!r}; known are {', '.join(_NAMES)}")
    return _NAMES[name]


@dataclass(frozen=True, slots=True)
class Entry:
    """A box's place in a file: `start` is its first byte, counted from the file's beginning."""

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
        """The box's name in the file."""
        return box_key(self.name, self.shape, self.box)


def box_key(name: str, shape: Sequence[int], box: Box) -> str:
    """A box's name in a file: the tensor's own where the box is all of it."""
    return name if box.sizes == tuple(shape) else f"{name}{box}"


def plan_file(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[Entry]]:
    """The file's first bytes (length and header), and the entries in the order of their data, with their places."""
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for entry in ordered:
        end = begin + entry.box.numel * entry.dtype.itemsize
        header[entry.key] = {**_kind(entry.dtype, entry.box), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    placed, start = [], len(head)
    for entry in ordered:
        placed.append(Entry(entry.name, entry.shape, entry.dtype, entry.box, start))
        start = placed[-1].stop
    return head, placed


def _kind(dtype: torch.dtype, box: Box) -> dict[str, object]:
    pairs = (2,) if dtype is torch.complex128 else ()
    return {"dtype": _SAFETENSORS[dtype], "shape": [*box.sizes, *pairs]}


class Header:
    """What a file's own header says of its boxes. ValueError where it is none that `plan_file` could have made."""

    def __init__(self, text: bytes, size: int) -> None:
        self._first = 8 + len(text)
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        self._entries = {key: entry for key, entry in content.items() if key != "__metadata__"}
        spans = sorted((*entry["data_offsets"],) for entry in self._entries.values())
        end = 0
        for begin, stop in spans:
            if begin != end or type(stop) is not int or stop < begin:
                raise ValueError(f"boxes that do not follow one another at byte {end} of the data")
            end = stop
        if self._first + end != size:
            raise ValueError(f"boxes that end at byte {self._first + end} of {size}")

    def start(self, name: str, shape: Sequence[int], dtype: torch.dtype, box: Box) -> int:
        """The first byte of a box in the file; ValueError where the header has it not, or another one."""
        key = box_key(name, shape, box)
        entry = self._entries.get(key)
        if entry is None:
            raise ValueError(f"no {key}")
        begin, stop = entry["data_offsets"]
        found = {kind: entry[kind] for kind in ("dtype", "shape")}
        if found != _kind(dtype, box) or stop - begin != box.numel * dtype.itemsize:
            raise ValueError(f"another {key}: {found['dtype']} {found['shape']}")
        return self._first + int(begin)


def tensor_bytes(tensor: Tensor, piece_bytes: int) -> Iterator[memoryview]:
    """A tensor's row-major bytes: of a contiguous one in host memory as it lies, of others piece by piece."""
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
    """A contiguous tensor's bytes in host memory, as they lie."""
    # as_strided, not reshape: a contiguous tensor of one element may have any stride, and then has no view as bytes.
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)
