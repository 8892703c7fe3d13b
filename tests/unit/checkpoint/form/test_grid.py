"""Regular shardings as one line: exactly the same boxes and writers, or no grid."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from disttrain.checkpoint.form.boxes import Box, overlap, tiling_fault
from disttrain.checkpoint.form.grid import Grid, find_grid


def chunks(size: int, parts: int) -> list[tuple[int, int]]:
    """(offset, length) of torch.chunk's pieces."""
    step = -(-size // parts)
    return [(start, min(step, size - start)) for start in range(0, size, step)]


def cut(shape: tuple[int, ...], parts: tuple[int, ...], first: int, strides: tuple[int, ...]) -> dict[Box, int]:
    held = {}
    spans = [list(enumerate(chunks(size, count))) for size, count in zip(shape, parts, strict=True)]
    for places in itertools.product(*spans):
        box = Box(tuple(o for _, (o, _) in places), tuple(n for _, (_, n) in places))
        held[box] = first + sum(k * stride for (k, _), stride in zip(places, strides, strict=True))
    return held


cuts = st.integers(0, 3).flatmap(
    lambda dims: st.tuples(
        *[st.tuples(*[st.integers(1, 9)] * dims) for _ in range(2)],
        st.integers(0, 5),
        st.tuples(*[st.integers(0, 4)] * dims),
    )
)


@given(cuts)
def test_a_regular_sharding_is_restored_box_by_box_with_its_writers(case: tuple) -> None:
    held = cut(*case)
    grid = find_grid(case[0], held)
    if len(set(held.values())) < len(held):
        assert grid is None, "a rank writes one box of it at most"
        return
    assert grid is not None
    assert dict(grid.all()) == held
    assert grid.ranks() == [rank for _, rank in grid.all()]
    assert tiling_fault(case[0], list(held)) is None


@given(cuts, st.data())
def test_boxes_that_meet_a_box_are_those_that_overlap_it(case: tuple, data: st.DataObject) -> None:
    held, shape = cut(*case), case[0]
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    wanted = Box(offsets, sizes)
    expected = {box: rank for box, rank in held.items() if overlap(box, wanted)}
    grid = find_grid(shape, held)
    assert grid is None or dict(grid.overlapping(wanted)) == expected


@given(cuts, st.data())
def test_a_missing_moved_or_misattributed_box_is_no_grid_or_the_right_one(case: tuple, data: st.DataObject) -> None:
    held, shape = cut(*case), case[0]
    box = data.draw(st.sampled_from(sorted(held, key=str)))
    rank = held.pop(box)
    lacking = find_grid(shape, held)
    assert lacking is None or dict(lacking.all()) == held
    held[box] = rank + data.draw(st.integers(1, 9))
    other = find_grid(shape, held)
    assert other is None or dict(other.all()) == held


def test_flat_ranges_and_uneven_shards_are_no_grid() -> None:
    assert find_grid((4, 3), {Box((0, 0), (1, 2)): 0, Box((0, 2), (1, 1)): 1, Box((1, 0), (3, 3)): 1}) is None
    assert find_grid((7,), {Box((0,), (3,)): 0, Box((3,), (1,)): 1, Box((4,), (3,)): 2}) is None
    assert find_grid((0, 3), {}) is None


def test_a_thousand_ranks_are_one_line() -> None:
    held = cut((4096, 64), (1024, 1), 0, (1, 0))
    grid = find_grid((4096, 64), held)
    assert grid == Grid((4096, 64), (4, 64), 0, (1, 0))
    assert math.prod(grid.counts) == 1024
    assert [rank for _, rank in grid.overlapping(Box((10, 0), (3, 64)))] == [2, 3]
