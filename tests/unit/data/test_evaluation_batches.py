"""An evaluation counts each sample once at any world size, and draws the same random numbers every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_parts import SEED, Augmented, Reader, Resumable, Sharded, drawn, generator_states
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import EvaluationBatches, MicroBatch
from disttrain.errors import DataError


def passes(dataset: Any, micro_batch: int, parts: int) -> list[list[MicroBatch]]:
    """The micro-batches of every part."""
    return [
        list(EvaluationBatches(dataset, seed=SEED, micro_batch=micro_batch, part=(part, parts)))
        for part in range(parts)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.sampled_from([Augmented, Reader]))
def test_each_sample_counts_once_and_parts_stay_aligned(size: int, micro_batch: int, parts: int, kind: Any) -> None:
    found = passes(kind(size), micro_batch, parts)
    assert {len(own) for own in found} == {-(-size // (micro_batch * parts))}, "rounds, equally many on every part"
    real = sorted((micro for own in found for micro in own if micro.real), key=lambda micro: micro.index)
    # A sample has the same position at any world size: an objective's draws for a micro-batch depend on it.
    assert [micro.index for micro in real] == list(range(-(-size // micro_batch)))
    rows = torch.cat([micro.batch for micro in real])
    assert rows.tolist() == torch.stack([drawn(-1, index) for index in range(size)]).tolist()
    assert all(len(micro.batch) == micro.samples for own in found for micro in own)
    for own in found:
        kept = [micro.real for micro in own]
        assert kept == sorted(kept, reverse=True), "replays come last"


def test_another_pass_draws_the_same_and_leaves_the_users_generators_unchanged() -> None:
    for dataset in (Augmented(10), Reader(10)):
        batches = EvaluationBatches(dataset, seed=SEED, micro_batch=3, part=(0, 2))
        before = generator_states()
        first = [micro.batch.tolist() for micro in batches]
        assert generator_states() == before
        torch.rand(5)
        assert [micro.batch.tolist() for micro in batches] == first


def test_streams_that_could_be_sharded_or_resumed_are_read_completely_from_the_front() -> None:
    found = passes(Sharded((5, 4, 3)), 2, 3)
    assert sorted(int(row[0]) for own in found for micro in own if micro.real for row in micro.batch) == [
        *range(5), *range(100, 104), *range(200, 203)
    ]  # fmt: skip
    dataset = Resumable(7)
    dataset.state["at"] = 4
    assert [int(row[0]) for micro in passes(dataset, 2, 1)[0] for row in micro.batch] == list(range(7))
    assert dataset.epoch == 0, "an evaluation has no epoch, and a negative one may break what is seeded with it"


@pytest.mark.parametrize("kind", [Augmented, Reader])
def test_an_empty_set_is_rejected_on_every_part(kind: Any) -> None:
    for part in range(3):
        with pytest.raises(DataError, match=f"(?s)Cannot evaluate on an empty set.*{kind.__name__} has no samples"):
            list(EvaluationBatches(kind(0), seed=SEED, micro_batch=2, part=(part, 3)))
