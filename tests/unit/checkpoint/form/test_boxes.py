"""Boxes compared with numpy: every claim is checked element by element on an array that counts coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.checkpoint import Box, flat_range_to_boxes, full_box, overlap, tiling_fault

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def shapes_and_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


@st.composite
def shapes_and_boxes(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    boxes = []
    for _ in range(count):
        starts = [draw(st.integers(0, size)) for size in shape]
        boxes.append(Box(tuple(starts), tuple(draw(st.integers(0, n - s)) for s, n in zip(starts, shape, strict=True))))
    return shape, boxes


def covered(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[box.slices()] += 1
    return counts


@given(shapes_and_ranges())
def test_a_flat_range_becomes_few_boxes_that_hold_exactly_its_elements_in_order(case) -> None:
    shape, start, stop = case
    boxes = flat_range_to_boxes(shape, start, stop)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    found = [number for box in boxes for number in numbers[box.slices()].reshape(-1).tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel for box in boxes)


def test_a_flat_range_outside_the_tensor_is_rejected() -> None:
    with pytest.raises(ValueError, match="not in a tensor"):
        flat_range_to_boxes((2, 3), 4, 7)


@given(shapes_and_boxes(2))
def test_an_overlap_is_what_both_boxes_cover(case) -> None:
    shape, (a, b) = case
    both = covered(shape, [a]) * covered(shape, [b])
    shared = overlap(a, b)
    assert overlap(b, a) == shared
    assert np.array_equal(both, covered(shape, [shared] if shared else []))
    assert (shared is None) == (both.sum() == 0)


@given(shapes_and_boxes(3))
def test_boxes_tile_exactly_when_each_element_is_covered_once(case) -> None:
    shape, boxes = case
    assert (tiling_fault(shape, boxes) is None) == bool((covered(shape, boxes) == 1).all())


@given(SHAPES, st.lists(st.floats(0, 1), max_size=5))
def test_split_flat_ranges_tile_and_miss_one_do_not(shape, cuts) -> None:
    numel = math.prod(shape)
    edges = [0, *sorted(int(cut * numel) for cut in cuts), numel]
    boxes = [box for a, b in itertools.pairwise(edges) for box in flat_range_to_boxes(shape, a, b)]
    assert tiling_fault(shape, boxes) is None
    for gone in range(len(boxes)):
        assert "elements" in (tiling_fault(shape, boxes[:gone] + boxes[gone + 1 :]) or "")
        assert tiling_fault(shape, [*boxes, boxes[gone]]) is not None


def test_a_box_outside_the_shape_is_named() -> None:
    assert "[1:3] is not inside shape (2,)" in (tiling_fault((2,), [Box((1,), (2,))]) or "")


def test_a_grid_of_sixteen_thousand_boxes_is_checked_in_a_blink() -> None:
    boxes = [Box((i, j), (1, 1)) for i in range(128) for j in range(128)]
    assert tiling_fault((128, 128), boxes) is None
    assert tiling_fault((128, 128), boxes[:-1]) is not None


def test_a_scalar_is_one_box_without_dims() -> None:
    assert full_box(()) == Box((), ()) == overlap(full_box(()), full_box(()))
    assert full_box(()).numel == 1
    assert tiling_fault((), [full_box(())]) is None
    assert tiling_fault((), [full_box(()), full_box(())]) is not None
    assert tiling_fault((), []) is not None


def test_a_box_with_impossible_numbers_is_rejected() -> None:
    with pytest.raises(ValueError, match="negative"):
        Box((0,), (-1,))
    with pytest.raises(ValueError, match="one size per offset"):
        Box((0, 0), (1,))
