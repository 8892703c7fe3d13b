"""Compares the tensors of two checkpoints, whatever boxes and files store them.

Local, without a process group. At most `batch_bytes` of each checkpoint and one chunk of a file are in memory. The
tensors are read in the file order of the first checkpoint, and every byte is verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, flat_range_to_boxes
from disttrain.checkpoint.form.manifest import TensorInfo
from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.read.reader import Checkpoint, LocatedBox

BATCH_BYTES = 64 * 2**20
"""Bytes of each checkpoint held in memory at once."""
_AT_ONCE = 2**18  # elements compared at once, at most 4 MiB per temporary
_Array = NDArray[Any]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LargestDifference:
    """The largest difference: its `value` (exact for integers), its index, and both checkpoints' elements there."""

    value: float | int
    at: tuple[int, ...]
    a: Any
    b: Any


@dataclass(frozen=True)
class StoredTensorDifference:
    """A tensor with the same name, shape and dtype in both checkpoints but different elements.

    `differing` of `numel` elements have different bits and are not NaN in both. `absolute` and `relative` (to the
    larger magnitude of the two) cover elements that are numbers in both. `nans` counts elements that are NaN in only
    one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    differing: int
    absolute: LargestDifference | None
    relative: LargestDifference | None
    nans: int
    nan: LargestDifference | None

    @property
    def numel(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def sort_key(self) -> tuple[bool, float | int]:
        """The key to sort differences by. A NaN against a number is larger than any number."""
        return (self.nans > 0, self.absolute.value if self.absolute else 0)


@dataclass(frozen=True)
class TensorMismatch:
    """A name whose tensors cannot be compared, with the shape and dtype in each checkpoint."""

    name: str
    a: tuple[tuple[int, ...], torch.dtype]
    b: tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Comparison:
    """All differences between tensors. `differences` starts with the largest, and `equal` counts equal tensors."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    misfits: tuple[TensorMismatch, ...]
    differences: tuple[StoredTensorDifference, ...]
    equal: int

    @property
    def same(self) -> bool:
        """Whether there are no differences."""
        return not (self.only_a or self.only_b or self.misfits or self.differences)


def compare_tensors(
    a: Checkpoint,
    b: Checkpoint,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    batch_bytes: int = BATCH_BYTES,
) -> Comparison:
    """Compare the tensors whose names `wanted` accepts. Local. Raises CheckpointError for damaged bytes."""
    names_a, names_b = (sorted(filter(wanted, one.tensors)) for one in (a, b))
    both = [name for name in names_a if name in b.tensors]
    kinds = {name: tuple((one.tensors[name].shape, one.tensors[name].dtype) for one in (a, b)) for name in both}
    fitting = [name for name in both if kinds[name][0] == kinds[name][1]]
    found = {name: _RunningDifference() for name in fitting}
    for batch in _batches(a, fitting, batch_bytes):
        held = [_blank(one, batch) for one in (a, b)]
        for checkpoint, shards in zip((a, b), held, strict=True):
            checkpoint.load_into(shards, strict=False)
        for left, right in zip(*held, strict=True):
            found[left.name].add(left.box, left.tensor, right.tensor)
    differences = [
        one for name, running in found.items() if (one := running.difference(name, a.tensors[name])) is not None
    ]
    return Comparison(
        only_a=tuple(name for name in names_a if name not in b.tensors),
        only_b=tuple(name for name in names_b if name not in a.tensors),
        misfits=tuple(TensorMismatch(name, *kinds[name]) for name in both if kinds[name][0] != kinds[name][1]),
        differences=tuple(sorted(differences, key=lambda one: one.sort_key, reverse=True)),
        equal=len(fitting) - len(differences),
    )


# ---------------------------------------------------------------------- batches to read together


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor whose bytes are contiguous in the first checkpoint, as boxes."""

    name: str
    boxes: tuple[Box, ...]
    size: int


def _batches(a: Checkpoint, names: Sequence[str], batch_bytes: int) -> Iterator[list[_Piece]]:
    """Yield the tensors in the file order of the first checkpoint, in batches of at most `batch_bytes`."""
    positions = sorted(
        ((stored.file, stored.start, name, stored) for name in names for stored in a.locate(name)),
        key=lambda position: position[:3],
    )
    batch: list[_Piece] = []
    remaining = batch_bytes
    for _, _, name, stored in positions:
        for piece in _pieces(name, stored, a.tensors[name].dtype, a.manifest.chunk_bytes, batch_bytes):
            if batch and piece.size > remaining:
                yield batch
                batch, remaining = [], batch_bytes
            batch.append(piece)
            remaining -= piece.size
    if batch:
        yield batch


def _pieces(name: str, stored: LocatedBox, dtype: torch.dtype, chunk_bytes: int, most: int) -> Iterator[_Piece]:
    """Yield a stored box, cut into pieces of at most `most` bytes that end at chunks, so that none is read twice."""
    item, numel = dtype.itemsize, stored.box.numel
    begin = 0
    while begin < numel:
        stop = min(begin + max(1, most // item), numel)
        last = (stored.start + stop * item) // chunk_bytes * chunk_bytes  # start of the chunk in which the cut is
        if stop < numel and last > stored.start + begin * item:
            stop = (last - stored.start) // item
        boxes = flat_range_to_boxes(stored.box.sizes, begin, stop)
        yield _Piece(name, tuple(box.shifted(stored.box.offsets) for box in boxes), (stop - begin) * item)
        begin = stop


def _blank(checkpoint: Checkpoint, batch: Sequence[_Piece]) -> list[Shard]:
    """Return shards to load the pieces into."""
    made = []
    for piece in batch:
        info = checkpoint.tensors[piece.name]
        made += [Shard(piece.name, info.shape, box, torch.empty(box.sizes, dtype=info.dtype)) for box in piece.boxes]
    return made


# ---------------------------------------------------------------------- differences of a tensor


@dataclass
class _RunningDifference:
    """The differences of one tensor found so far."""

    differing: int = 0
    nans: int = 0
    absolute: LargestDifference | None = None
    relative: LargestDifference | None = None
    nan: LargestDifference | None = None

    def add(self, box: Box, a: Tensor, b: Tensor) -> None:
        """Add one box of the tensor."""
        bits = [_bits(tensor) for tensor in (a, b)]
        for start in range(0, len(bits[0]), _AT_ONCE):
            parts = [every[start : start + _AT_ONCE] for every in bits]
            if not torch.equal(*parts):
                other = (parts[0] != parts[1]).any(dim=1).nonzero().flatten()
                indices = _ElementIndices(box, (other + start).numpy())
                self._add_values(_values(parts[0][other], a.dtype), _values(parts[1][other], a.dtype), indices)

    def _add_values(self, a: _Array, b: _Array, indices: _ElementIndices) -> None:
        """Add elements whose bits differ."""
        nan_a, nan_b = a != a, b != b
        one_sided, numbers = np.flatnonzero(nan_a != nan_b), np.flatnonzero(~(nan_a | nan_b))
        self.differing += len(one_sided) + len(numbers)
        self.nans += len(one_sided)
        if len(one_sided) and self.nan is None:
            first = int(one_sided[0])
            self.nan = LargestDifference(math.nan, indices[first], a[first].item(), b[first].item())
        if len(numbers):
            a, b, indices = a[numbers], b[numbers], indices.only(numbers)
            absolute, relative = _distances(a, b)
            self.absolute = _larger(self.absolute, absolute, a, b, indices)
            self.relative = _larger(self.relative, relative, a, b, indices)

    def difference(self, name: str, info: TensorInfo) -> StoredTensorDifference | None:
        """Return the difference, or None if the tensors are equal."""
        if not self.differing:
            return None
        found = (self.differing, self.absolute, self.relative, self.nans, self.nan)
        return StoredTensorDifference(name, info.shape, info.dtype, *found)


@dataclass(frozen=True)
class _ElementIndices:
    """The indices of elements in a tensor, stored as positions in the row-major order of a box."""

    box: Box
    numbers: _Array

    def __getitem__(self, which: int) -> tuple[int, ...]:
        index, rest = [], int(self.numbers[which])
        for offset, size in zip(reversed(self.box.offsets), reversed(self.box.sizes), strict=True):
            rest, inside = divmod(rest, size)
            index.append(offset + inside)
        return tuple(reversed(index))

    def only(self, which: _Array) -> _ElementIndices:
        return _ElementIndices(self.box, self.numbers[which])


def _bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers of the same bits: (elements, 1), or (elements, 2) for the widest dtype."""
    return tensor.reshape(-1, 1).view(_BITS[min(tensor.dtype.itemsize, 8)])


def _values(bits: Tensor, dtype: torch.dtype) -> _Array:
    """Return the elements in a type that changes none of them: float64, complex128, int64 or uint64."""
    tensor = bits.view(dtype).reshape(-1)
    if dtype.is_complex:
        return np.asarray(tensor.to(torch.complex128).numpy())
    if dtype.is_floating_point:
        return np.asarray(tensor.double().numpy())
    return np.asarray(tensor.numpy().astype(np.uint64 if dtype is torch.uint64 else np.int64))


def _distances(a: _Array, b: _Array) -> tuple[_Array, _Array]:
    """Return |a - b|, exact for integers (as uint64), and |a - b| relative to the larger magnitude of the two."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if a.dtype.kind in "iu":  # two wrap-arounds cancel each other
            words = [values.astype(np.uint64) for values in (a, b)]
            absolute = np.where(a > b, words[0] - words[1], words[1] - words[0])
            a, b = a.astype(np.float64), b.astype(np.float64)
        else:
            absolute = np.abs(a - b)
        absolute = np.where(np.isnan(absolute), math.inf, absolute) if absolute.dtype.kind == "f" else absolute
        magnitude = np.maximum(np.abs(a), np.abs(b))
        relative = np.where(magnitude > 0, absolute / magnitude, 0.0)  # the distance of +0 and -0 is zero
    return absolute, np.where(np.isnan(relative), math.inf, relative)


def _larger(
    known: LargestDifference | None, values: _Array, a: _Array, b: _Array, indices: _ElementIndices
) -> LargestDifference:
    at = int(values.argmax())
    if known is not None and known.value >= values[at]:
        return known
    return LargestDifference(values[at].item(), indices[at], a[at].item(), b[at].item())
