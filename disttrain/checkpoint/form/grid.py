"""Describes how most tensors are cut: into equal steps along each dim, with one box per rank. Pure.

A grid takes one line of the manifest for any number of ranks. A list of boxes would grow with tensors times ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from disttrain.checkpoint.form.boxes import Box, overlap


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor of `shape` in boxes of `steps` along each dim. The last box of a dim may be shorter, as in torch.chunk.

    Rank `first + i * strides[0] + j * strides[1] + ...` writes the box at (i, j, ...). No rank writes two boxes.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    first: int
    strides: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of boxes along each dim."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.steps, strict=True))

    def box(self, cell: Sequence[int]) -> Box:
        """Return the box at a cell of the grid."""
        offsets = tuple(k * step for k, step in zip(cell, self.steps, strict=True))
        sizes = tuple(min(step, n - o) for step, n, o in zip(self.steps, self.shape, offsets, strict=True))
        return Box(offsets, sizes)

    def rank(self, cell: Sequence[int]) -> int:
        """Return the rank that wrote the box at a cell."""
        return self.first + sum(k * stride for k, stride in zip(cell, self.strides, strict=True))

    def overlapping(self, wanted: Box) -> Iterator[tuple[Box, int]]:
        """Yield the boxes that overlap `wanted`, each with its writer. Looks at no other box."""
        spans = [
            range(offset // step, -(-stop // step))
            for offset, stop, step in zip(wanted.offsets, wanted.stops, self.steps, strict=True)
        ]
        for cell in product(*spans):
            box = self.box(cell)
            if overlap(box, wanted):
                yield box, self.rank(cell)

    def all(self) -> Iterator[tuple[Box, int]]:
        """Yield every box with its writer, in row-major order of the grid."""
        for cell in product(*(range(count) for count in self.counts)):
            yield self.box(cell), self.rank(cell)

    def holds(self, item: tuple[Box, int]) -> bool:
        """Return whether a box with its writer belongs to the grid."""
        box, rank = item
        for offset, size, n, step, stride in zip(
            box.offsets, box.sizes, self.shape, self.steps, self.strides, strict=True
        ):
            index, rest = divmod(offset, step)
            if rest or size != min(step, n - offset):
                return False
            rank -= index * stride
        return rank == self.first

    def ranks(self) -> list[int]:
        """Return the writers in row-major order of the grid."""
        return [self.rank(cell) for cell in product(*(range(count) for count in self.counts))]


def find_grid(shape: Sequence[int], held: Mapping[Box, int]) -> Grid | None:
    """Return the grid that the boxes, each with its writer, form of a tensor. Return None if they form no grid.

    Boxes that tile the tensor differently, or whose writers are in another order, remain a list. Boxes that form a
    grid tile the tensor. Each box is read once, because a thousand ranks have many.
    """
    shape = tuple(shape)
    if not math.prod(shape):
        return None
    # Along each dim, the smallest nonzero offset is the step. The writer of the box there gives the stride.
    steps = list(shape)
    beyond = [-1] * len(shape)
    origin = -1
    for box, rank in held.items():
        away = [dim for dim, offset in enumerate(box.offsets) if offset]
        if not away:
            origin = rank
        for dim in away:
            if box.offsets[dim] <= steps[dim]:
                steps[dim] = box.offsets[dim]
                if len(away) == 1:
                    beyond[dim] = rank
    strides = tuple(0 if step == size else rank - origin for step, size, rank in zip(steps, shape, beyond, strict=True))
    grid = Grid(shape, tuple(steps), origin, strides)
    if origin < 0 or min(strides, default=0) < 0 or len(held) != math.prod(grid.counts):
        return None
    if len(set(held.values())) != len(held) or not all(map(grid.holds, held.items())):
        return None
    return grid
