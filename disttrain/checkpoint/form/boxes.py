"""Computes with boxes, the form in which tensors cross strategies and world sizes. Pure.

A box is a rectangular part of a tensor, given by its first index (`offsets`) and its length (`sizes`) in each dim.
Strategies use boxes to state which part of a tensor a rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor. The box of a scalar is `Box((), ())`. A box is empty if a size is 0."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"a box needs one size per offset, not offsets {self.offsets} and sizes {self.sizes}")
        if any(number < 0 for number in (*self.offsets, *self.sizes)):
            raise ValueError(f"a box must not have negative numbers: offsets {self.offsets}, sizes {self.sizes}")

    @property
    def stops(self) -> tuple[int, ...]:
        """The first index after the box in each dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        """The number of elements in the box."""
        return math.prod(self.sizes)

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Return the index of this box in a tensor whose first element is at `origin` (by default at zero)."""
        start = self.offsets if origin is None else tuple(o - z for o, z in zip(self.offsets, origin, strict=True))
        return tuple(slice(begin, begin + size) for begin, size in zip(start, self.sizes, strict=True))

    def shifted(self, by: Sequence[int]) -> Box:
        """Return the box moved by `by` in each dim."""
        return Box(tuple(offset + more for offset, more in zip(self.offsets, by, strict=True)), self.sizes)

    def __str__(self) -> str:
        return "[" + ",".join(f"{a}:{b}" for a, b in zip(self.offsets, self.stops, strict=True)) + "]"


def full_box(shape: Sequence[int]) -> Box:
    """Return the box that covers a complete tensor."""
    return Box((0,) * len(shape), tuple(shape))


def overlap(a: Box, b: Box) -> Box | None:
    """Return the part that two boxes of one tensor share, or None if they share no element."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    sizes = tuple(min(x, y) - begin for x, y, begin in zip(a.stops, b.stops, offsets, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut elements `start` to `stop` of a tensor's row-major order into at most `2 * ndim - 1` boxes.

    The boxes are in row-major order, and each is contiguous in it. They can therefore be cut from the flat range one
    after the other.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"elements {start} to {stop} are not in a tensor of shape {tuple(shape)}")
    if start == stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,)) if shape else Box((), ())]
    inner = tuple(shape[1:])
    row = math.prod(inner)
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last or (last == first + 1 and head and not tail):  # inside one row
        return _in_row(first, flat_range_to_boxes(inner, head, stop - first * row))
    boxes: list[Box] = []
    if head:
        boxes += _in_row(first, flat_range_to_boxes(inner, head, row))
        first += 1
    if last > first:
        boxes.append(Box((first, *(0 for _ in inner)), (last - first, *inner)))
    if tail:
        boxes += _in_row(last, flat_range_to_boxes(inner, 0, tail))
    return boxes


def _in_row(row: int, boxes: list[Box]) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.sizes)) for box in boxes]


def tiling_fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Describe why `boxes` do not cover a tensor exactly: outside, overlap or gap. Return None if they do.

    Empty boxes are ignored.
    """
    full = [box for box in boxes if box.numel]
    for box in full:
        if len(box.sizes) != len(shape) or any(stop > size for stop, size in zip(box.stops, shape, strict=True)):
            return f"box {box} is not inside shape {tuple(shape)}"
    pair = _overlapping_pair(full)
    if pair:
        return f"boxes {pair[0]} and {pair[1]} overlap"
    held, needed = sum(box.numel for box in full), math.prod(shape)
    return None if held == needed else f"the boxes hold {held} of {needed} elements"


def _overlapping_pair(boxes: list[Box], dim: int = 0) -> tuple[Box, Box] | None:
    """Return two boxes that overlap, or None.

    Boxes that are separate along a dim are split into groups there, then along the next dim. The grids and flat ranges
    of real meshes thus cost one sort per dim instead of a comparison of all pairs.
    """
    if len(boxes) < 2:
        return None
    if dim == len(boxes[0].sizes):
        return next((pair for pair in combinations(boxes, 2) if overlap(*pair)), None)
    together: list[Box] = []
    reach = 0
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        if together and box.offsets[dim] >= reach:
            pair = _overlapping_pair(together, dim + 1)
            if pair:
                return pair
            together = []
        together.append(box)
        reach = max(reach, box.offsets[dim] + box.sizes[dim])
    return _overlapping_pair(together, dim + 1)
