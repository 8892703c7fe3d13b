"""The division of a step's samples over ranks: every sample once, and the same number of rounds on every rank."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import align_batches, plan_step
from disttrain.data.step_plan import Slot, distinct, even_share, plan_share
from disttrain.errors import DataError

SAMPLES, MICRO, PARTS = st.integers(1, 200), st.integers(1, 64), st.integers(1, 9)


def replays_come_last(slots: list[Slot]) -> bool:
    real = [slot.real for slot in slots]
    return real == sorted(real, reverse=True)


@settings(max_examples=200, deadline=None)
@given(SAMPLES, MICRO, PARTS)
def test_every_sample_is_computed_once_and_parts_stay_aligned(samples: int, micro_batch: int, parts: int) -> None:
    plans = [plan_step(samples, micro_batch, (part, parts)) for part in range(parts)]
    assert len({len(plan) for plan in plans}) == 1
    micro_batches = -(-samples // micro_batch)
    assert len(plans[0]) == -(-micro_batches // parts), "no more rounds than are needed"
    real = sorted((slot for plan in plans for slot in plan if slot.real), key=lambda slot: slot.index)
    assert [slot.index for slot in real] == list(range(micro_batches))
    assert [k for slot in real for k in range(slot.start, slot.start + slot.count)] == list(range(samples))
    assert all(1 <= slot.count <= micro_batch for plan in plans for slot in plan)
    for part, plan in enumerate(plans):
        assert replays_come_last(plan)
        own = [slot for slot in plan if slot.real]
        assert all(slot.index % parts == part for slot in own)
        replayed = own[-1] if own else real[0]
        assert all(
            (s.index, s.start, s.count) == (replayed.index, replayed.start, replayed.count) for s in plan[len(own) :]
        )
        assert [slot.index for slot in distinct(plan)] == ([slot.index for slot in own] or [0])


@settings(max_examples=200, deadline=None)
@given(st.data(), MICRO, PARTS)
def test_shares_of_sharded_streams_are_even_and_aligned(data: st.DataObject, micro_batch: int, parts: int) -> None:
    samples = data.draw(st.integers(parts, 200))
    shares = [even_share(samples, (part, parts)) for part in range(parts)]
    assert sum(shares) == samples
    assert max(shares) - min(shares) <= 1
    plans = [plan_share(samples, micro_batch, (part, parts)) for part in range(parts)]
    assert {len(plan) for plan in plans} == {-(-max(shares) // micro_batch)}
    for share, plan in zip(shares, plans, strict=True):
        assert replays_come_last(plan)
        assert [k for s in plan if s.real for k in range(s.start, s.start + s.count)] == list(range(share))
    places = [slot.index for plan in plans for slot in plan if slot.real]
    assert len(set(places)) == len(places), "a place in the global batch keys the micro-batch's dropout"


def test_a_worked_example() -> None:
    # Seven samples by two over three parts: 0-1, 2-3, 4-5, 6. The last round has one micro-batch and two replays.
    assert plan_step(7, 2, (0, 3)) == [Slot(0, 0, 2, True), Slot(3, 6, 1, True)]
    assert plan_step(7, 2, (1, 3)) == [Slot(1, 2, 2, True), Slot(1, 2, 2, False)]
    assert plan_step(7, 2, (2, 3)) == [Slot(2, 4, 2, True), Slot(2, 4, 2, False)]
    assert plan_step(1, 4, (2, 3)) == [Slot(0, 0, 1, False)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_micro_batches_of_a_script_are_each_used_once_and_the_last_is_replayed(counts: list[int]) -> None:
    steps = [align_batches([f"{part}.{k}" for k in range(count)], counts, part) for part, count in enumerate(counts)]
    assert {len(step) for step in steps} == {max(counts)}
    for part, (count, step) in enumerate(zip(counts, steps, strict=True)):
        assert [micro.batch for micro in step] == [f"{part}.{min(k, count - 1)}" for k in range(max(counts))]
        assert [micro.real for micro in step] == [k < count for k in range(max(counts))]
    places = [micro.index for step in steps for micro in step if micro.real]
    assert len(set(places)) == sum(counts)


def test_a_rank_without_a_batch_is_rejected_on_all_ranks() -> None:
    for part in range(3):
        with pytest.raises(DataError, match="2, 0, 1 batches"):
            align_batches(["a"], [2, 0, 1], part)
