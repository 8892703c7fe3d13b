"""What differs between the tensors of two checkpoints, whatever boxes and files they lie in.

Local and free of a process group. Holds at most `batch_bytes` of each checkpoint and one chunk of a file; follows how
the first one's bytes lie, so that those are read in order. Every byte is held against its checksum.
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
"""How much of each checkpoint is held at once."""
_AT_ONCE = 2**18  # elements whose differences are computed at once: at most 4 MiB a value held
_Array = NDArray[Any]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LargestDifference:
    """A largest difference: its `value` (exact for whole numbers), its index and what either checkpoint holds there."""

    value: float | int
    at: tuple[int, ...]
    a: Any
    b: Any


@dataclass(frozen=True)
class StoredTensorDifference:
    """A tensor of one name, shape and dtype that is not the same in both.

    `differing` of `numel` elements have other bits and are not both NaN. `absolute` and `relative` (to the larger
    magnitude of the two) are over those where both hold numbers; `nans` counts those where just one is NaN.
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
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @property
    def rank(self) -> tuple[bool, float | int]:
        """What to sort by: a NaN against a number is beyond any number."""
        return (self.nans > 0, self.absolute.value if self.absolute else 0)


@dataclass(frozen=True)
class TensorMismatch:
    """A name whose tensors cannot be compared: (shape, dtype) in either checkpoint."""

    name: str
    a: tuple[tuple[int, ...], torch.dtype]
    b: tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Comparison:
    """All that differs in tensors; `differences` with the largest first, `equal` the number of the others."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    misfits: tuple[TensorMismatch, ...]
    differences: tuple[StoredTensorDifference, ...]
    equal: int

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_a or self.only_b or self.misfits or self.differences)


def compare_tensors(
    a: Checkpoint,
    b: Checkpoint,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    batch_bytes: int = BATCH_BYTES,
) -> Comparison:
    """Compare the tensors whose names are `wanted`. Local. Raises CheckpointError for bytes that are damaged."""
    names_a, names_b = (sorted(filter(wanted, one.tensors)) for one in (a, b))
    both = [name for name in names_a if name in b.tensors]
    kinds = {name: tuple((one.tensors[name].shape, one.tensors[name].dtype) for one in (a, b)) for name in both}
    fitting = [name for name in both if kinds[name][0] == kinds[name][1]]
    found = {name: _Running() for name in fitting}
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
        differences=tuple(sorted(differences, key=lambda one: one.rank, reverse=True)),
        equal=len(fitting) - len(differences),
    )


# ---------------------------------------------------------------------- what to read together


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor whose bytes lie in a row in the first checkpoint, as boxes."""

    name: str
    boxes: tuple[Box, ...]
    size: int


def _batches(a: Checkpoint, names: Sequence[str], batch_bytes: int) -> Iterator[list[_Piece]]:
    """The tensors in the order in which they lie in the first checkpoint, as much at once as may be held."""
    places = sorted(
        ((stored.file, stored.start, name, stored) for name in names for stored in a.locate(name)),
        key=lambda place: place[:3],
    )
    batch: list[_Piece] = []
    room = batch_bytes
    for _, _, name, stored in places:
        for piece in _pieces(name, stored, a.tensors[name].dtype, a.manifest.chunk_bytes, batch_bytes):
            if batch and piece.size > room:
                yield batch
                batch, room = [], batch_bytes
            batch.append(piece)
            room -= piece.size
    if batch:
        yield batch


def _pieces(name: str, stored: LocatedBox, dtype: torch.dtype, chunk_bytes: int, most: int) -> Iterator[_Piece]:
    """A stored box, cut where it is more than may be held: at the ends of chunks, so that none is read twice."""
    item, numel = dtype.itemsize, stored.box.numel
    begin = 0
    while begin < numel:
        stop = min(begin + max(1, most // item), numel)
        last = (stored.start + stop * item) // chunk_bytes * chunk_bytes  # where the chunk of the cut begins
        if stop < numel and last > stored.start + begin * item:
            stop = (last - stored.start) // item
        boxes = flat_range_to_boxes(stored.box.sizes, begin, stop)
        yield _Piece(name, tuple(box.shifted(stored.box.offsets) for box in boxes), (stop - begin) * item)
        begin = stop


def _blank(checkpoint: Checkpoint, batch: Sequence[_Piece]) -> list[Shard]:
    """Shards to load the pieces into."""
    made = []
    for piece in batch:
        info = checkpoint.tensors[piece.name]
        made += [Shard(piece.name, info.shape, box, torch.empty(box.sizes, dtype=info.dtype)) for box in piece.boxes]
    return made


# ---------------------------------------------------------------------- what differs in it


@dataclass
class _Running:
    """What was found of a tensor so far."""

    differing: int = 0
    nans: int = 0
    absolute: LargestDifference | None = None
    relative: LargestDifference | None = None
    nan: LargestDifference | None = None

    def add(self, box: Box, a: Tensor, b: Tensor) -> None:
        """Count one more box of it in."""
        bits = [_bits(tensor) for tensor in (a, b)]
        for start in range(0, len(bits[0]), _AT_ONCE):
            parts = [every[start : start + _AT_ONCE] for every in bits]
            if not torch.equal(*parts):
                other = (parts[0] != parts[1]).any(dim=1).nonzero().flatten()
                places = _ElementIndices(box, (other + start).numpy())
                self._add_values(_values(parts[0][other], a.dtype), _values(parts[1][other], a.dtype), places)

    def _add_values(self, a: _Array, b: _Array, places: _ElementIndices) -> None:
        """Elements whose bits differ."""
        nan_a, nan_b = a != a, b != b
        one_sided, numbers = np.flatnonzero(nan_a != nan_b), np.flatnonzero(~(nan_a | nan_b))
        self.differing += len(one_sided) + len(numbers)
        self.nans += len(one_sided)
        if len(one_sided) and self.nan is None:
            first = int(one_sided[0])
            self.nan = LargestDifference(math.nan, places[first], a[first].item(), b[first].item())
        if len(numbers):
            a, b, places = a[numbers], b[numbers], places.only(numbers)
            absolute, relative = _distances(a, b)
            self.absolute = _larger(self.absolute, absolute, a, b, places)
            self.relative = _larger(self.relative, relative, a, b, places)

    def difference(self, name: str, info: TensorInfo) -> StoredTensorDifference | None:
        """The verdict; None where nothing differs."""
        if not self.differing:
            return None
        found = (self.differing, self.absolute, self.relative, self.nans, self.nan)
        return StoredTensorDifference(name, info.shape, info.dtype, *found)


@dataclass(frozen=True)
class _ElementIndices:
    """Where elements lie in a tensor: numbers in the row-major order of a box of it."""

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
    """The elements as whole numbers of the same bits: (elements, 1), or (elements, 2) for the widest dtype."""
    return tensor.reshape(-1, 1).view(_BITS[min(tensor.dtype.itemsize, 8)])


def _values(bits: Tensor, dtype: torch.dtype) -> _Array:
    """The elements, wide enough that none changes: float64, complex128, int64 or uint64."""
    tensor = bits.view(dtype).reshape(-1)
    if dtype.is_complex:
        return np.asarray(tensor.to(torch.complex128).numpy())
    if dtype.is_floating_point:
        return np.asarray(tensor.double().numpy())
    return np.asarray(tensor.numpy().astype(np.uint64 if dtype is torch.uint64 else np.int64))


def _distances(a: _Array, b: _Array) -> tuple[_Array, _Array]:
    """|a - b|, exact for whole numbers (as uint64), and the same relative to the larger magnitude of the two."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if a.dtype.kind in "iu":  # wraps around twice, and so comes out right
            whole = [values.astype(np.uint64) for values in (a, b)]
            absolute = np.where(a > b, whole[0] - whole[1], whole[1] - whole[0])
            a, b = a.astype(np.float64), b.astype(np.float64)
        else:
            absolute = np.abs(a - b)
        absolute = np.where(np.isnan(absolute), math.inf, absolute) if absolute.dtype.kind == "f" else absolute
        magnitude = np.maximum(np.abs(a), np.abs(b))
        relative = np.where(magnitude > 0, absolute / magnitude, 0.0)  # zeros of two signs differ by nothing
    return absolute, np.where(np.isnan(relative), math.inf, relative)


def _larger(
    known: LargestDifference | None, values: _Array, a: _Array, b: _Array, places: _ElementIndices
) -> LargestDifference:
    at = int(values.argmax())
    if known is not None and known.value >= values[at]:
        return known
    return LargestDifference(values[at].item(), places[at], a[at].item(), b[at].item())
