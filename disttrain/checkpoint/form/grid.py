"""How most tensors are cut: into equal steps along each dim, box by box over the ranks. One line, whatever the ranks.

A list of boxes would make the manifest grow with tensors times ranks. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from disttrain.checkpoint.form.boxes import Box, overlap


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor of `shape` in boxes of `steps` along each dim (the last of a dim may be shorter), as torch.chunk cuts.

    The box at (i, j, ...) is written by rank `first + i * strides[0] + j * strides[1] + ...`; no rank writes two.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    first: int
    strides: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many boxes along each dim."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.steps, strict=True))

    def box(self, place: Sequence[int]) -> Box:
        """The box at a place of the grid."""
        offsets = tuple(k * step for k, step in zip(place, self.steps, strict=True))
        sizes = tuple(min(step, n - o) for step, n, o in zip(self.steps, self.shape, offsets, strict=True))
        return Box(offsets, sizes)

    def rank(self, place: Sequence[int]) -> int:
        """The rank that wrote the box at a place."""
        return self.first + sum(k * stride for k, stride in zip(place, self.strides, strict=True))

    def overlapping(self, wanted: Box) -> Iterator[tuple[Box, int]]:
        """The boxes that share something with `wanted`, each with its writer; looks at no other."""
        spans = [
            range(offset // step, -(-stop // step))
            for offset, stop, step in zip(wanted.offsets, wanted.stops, self.steps, strict=True)
        ]
        for place in product(*spans):
            box = self.box(place)
            if overlap(box, wanted):
                yield box, self.rank(place)

    def all(self) -> Iterator[tuple[Box, int]]:
        """Every box with its writer, in row-major order of the grid."""
        for place in product(*(range(count) for count in self.counts)):
            yield self.box(place), self.rank(place)

    def holds(self, item: tuple[Box, int]) -> bool:
        """Whether a box with its writer is one of these."""
        box, rank = item
        for offset, size, n, step, stride in zip(
            box.offsets, box.sizes, self.shape, self.steps, self.strides, strict=True
        ):
            place, rest = divmod(offset, step)
            if rest or size != min(step, n - offset):
                return False
            rank -= place * stride
        return rank == self.first

    def ranks(self) -> list[int]:
        """The writers, in row-major order of the grid."""
        return [self.rank(place) for place in product(*(range(count) for count in self.counts))]


def find_grid(shape: Sequence[int], held: Mapping[Box, int]) -> Grid | None:
    """The grid that these boxes (each with its writer) make of a tensor; None where they make none.

    Boxes that tile the tensor otherwise, or whose writers are in no such order, stay a list. Boxes that make a grid
    tile the tensor. Looks at each box once: with a thousand ranks there are many.
    """
    shape = tuple(shape)
    if not math.prod(shape):
        return None
    # The smallest offset that is not zero is the step, along each dim; the box there says how far its writer is.
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
