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

from disttrain.checkpoint.boxes import Box, flat_range_to_boxes
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
        """The box's name in the file: the tensor's own where the box is all of it."""
        return self.name if self.box.sizes == self.shape else f"{self.name}{self.box}"


def plan_file(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[Entry]]:
    """The file's first bytes (length and header), and the entries in the order of their data, with their places."""
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for entry in ordered:
        end = begin + entry.box.numel * entry.dtype.itemsize
        pairs = (2,) if entry.dtype is torch.complex128 else ()
        header[entry.key] = {
            "dtype": _SAFETENSORS[entry.dtype],
            "shape": [*entry.box.sizes, *pairs],
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    placed, start = [], len(head)
    for entry in ordered:
        placed.append(Entry(entry.name, entry.shape, entry.dtype, entry.box, start))
        start = placed[-1].stop
    return head, placed


def tensor_bytes(tensor: Tensor, piece_bytes: int) -> Iterator[memoryview]:
    """A tensor's row-major bytes: of a contiguous one in host memory as it lies, of others piece by piece."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        yield _raw(tensor)
        return
    shape = tuple(tensor.shape)
    numel, step = math.prod(shape), max(1, piece_bytes // tensor.dtype.itemsize)
    for start in range(0, numel, step):
        for box in flat_range_to_boxes(shape, start, min(start + step, numel)):
            piece = tensor[box.slices()].resolve_conj().resolve_neg().contiguous()
            yield _raw(piece.cpu())


def _raw(tensor: Tensor) -> memoryview:
    # as_strided, not reshape: a contiguous tensor of one element may have any stride, and then has no view as bytes.
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)
