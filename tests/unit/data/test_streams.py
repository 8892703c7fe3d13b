"""Iterable data: split over ranks with each sample once; resumed exactly, by reading again, or rejected."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import (
    SEED,
    Augmented,
    Reader,
    Resumable,
    Sharded,
    chunks,
    drawn,
    generator_states,
    joined,
    keyed_seed,
    steps_of_parts,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import IterableDataset
from world import run_world

import disttrain
from disttrain.data import Batches
from disttrain.errors import DataError


def make(dataset: Any, part: tuple[int, int] = (0, 1), **more: Any) -> Batches:
    return Batches(dataset, **{"seed": SEED, "global_batch": 4, "micro_batch": 2, "part": part} | more)


def expected(size: int, global_batch: int, count: int, *, drop: bool = False, per_epoch: int = 0) -> list[list[Tensor]]:
    """Rows of the first steps. Item k of an epoch is keyed by k, and is k, or also contains its epoch."""
    epochs = ((epoch, range(size)) for epoch in itertools.count())
    steps = itertools.islice(chunks(epochs, global_batch, drop=drop), count)
    return [[drawn(epoch, k, per_epoch * epoch + k) for k in items] for epoch, items in steps]


def rows(steps: list[list[Any]]) -> list[Any]:
    return [torch.stack(list(items)).tolist() for items in steps]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 8), st.integers(1, 4), st.sampled_from(["short", "drop"]))
def test_every_item_once_per_epoch_with_draws_keyed_by_its_number(
    data: st.DataObject, size: int, micro_batch: int, parts: int, last: str
) -> None:
    global_batch = data.draw(st.integers(1, size))
    found = steps_of_parts(
        lambda part: make(Reader(size), part, global_batch=global_batch, micro_batch=micro_batch, last=last), parts, 5
    )
    assert rows(joined(found)) == rows(expected(size, global_batch, 5, drop=last == "drop"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_a_state_continues_exactly_at_any_other_world_size(at: int, parts: int, later: int, micro_batch: int) -> None:
    first = make(Resumable(10), (0, parts))
    take(first, at)
    state = json.loads(json.dumps(first.state_dict()))
    datasets = [Resumable(10) for _ in range(later)]

    def resumed(part: tuple[int, int]) -> Batches:
        batches = make(datasets[part[0]], part, micro_batch=micro_batch)
        batches.load_state_dict(state)
        return batches

    rest = rows(joined(steps_of_parts(resumed, later, 4)))
    assert rest == rows(expected(10, 4, at + 4, per_epoch=1000)[at:]), "the epoch is known again, too"
    consumed = sum(len(step) for step in rest)
    assert all(dataset.read == consumed for dataset in datasets), "nothing is read twice"


def test_a_position_does_not_change_while_reading_continues() -> None:
    steps = take(make(Resumable(10)), 3)
    assert [step.position["stream"] for step in steps] == [{"at": 4}, {"at": 8}, {"at": 10}]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_without_a_state_a_position_is_rejected_or_reached_by_reading_again(at: int) -> None:
    first = make(Reader(10))
    take(first, at)
    state = json.loads(json.dumps(first.state_dict()))
    with pytest.raises(DataError, match=r"(?s)Cannot continue Reader at sample \d+.*on_resume=replay"):
        make(Reader(10)).load_state_dict(state)

    def resumed(part: tuple[int, int]) -> Batches:
        batches = make(Reader(10), part, on_resume="replay")
        batches.load_state_dict(state)
        return batches

    assert rows(joined(steps_of_parts(resumed, 2, 4))) == rows(expected(10, 4, at + 4)[at:])


def test_the_start_of_an_epoch_needs_no_state() -> None:
    batches = make(Reader(10))
    batches.load_state_dict(make(Reader(10)).state_dict())
    assert rows(joined([take(batches, 2)])) == rows(expected(10, 4, 2))


class Shuffling(IterableDataset):
    """Draws its complete order when it begins."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(12))


def test_an_order_drawn_at_the_beginning_is_equal_on_all_parts_and_new_in_every_epoch() -> None:
    found = [[int(i) for i in items] for items in joined(steps_of_parts(lambda part: make(Shuffling(), part), 3, 6))]
    first, second = list(itertools.chain(*found[:3])), list(itertools.chain(*found[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    later = make(Shuffling(), on_resume="replay")
    later.load_state_dict({"epoch": 1, "position": 4})
    assert [[int(i) for i in items] for items in joined([take(later, 2)])] == found[4:]


def test_the_users_generators_are_unchanged() -> None:
    before = generator_states()
    take(make(Reader(10), collate=lambda items: torch.stack(items) + torch.rand(())), 5)
    assert generator_states() == before


def test_workers_are_not_used_and_a_message_says_so(caplog: pytest.LogCaptureFixture) -> None:
    batches = make(Reader(10), workers=3)
    assert "data.workers=3: iterable data is read in the training process, without workers" in caplog.text
    assert rows(joined([take(batches, 2)])) == rows(expected(10, 4, 2))


def test_an_iterable_without_torchs_base_class_is_a_stream() -> None:
    class Plain:
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

    assert [[int(i) for i in items] for items in joined([take(make(Plain()), 3)])] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [0, 1, 2, 3],
    ]


def test_an_iterator_that_ends_after_one_epoch_is_not_waited_for() -> None:
    batches = iter(make(iter(range(8))))
    next(batches), next(batches)
    with pytest.raises(DataError, match=r"(?s)in epoch 1.*must start from the beginning"):
        next(batches)


@pytest.mark.parametrize(("size", "last"), [(0, "short"), (3, "drop")])
def test_a_stream_without_one_step_is_rejected_on_every_part(size: int, last: str) -> None:
    for part in range(3):
        with pytest.raises(DataError, match=r"(?s)global_batch=4 .*Reader ended before its first step"):
            next(iter(make(Reader(size), (part, 3), last=last)))


def test_errors_of_a_streams_code_are_raised_with_the_position() -> None:
    def broken() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    batches = iter(make(broken()))
    next(batches)
    with pytest.raises(OSError, match="the disk is gone") as raised:
        next(batches)
    assert raised.value.__notes__ == ["while reading item 5 of generator in epoch 0"]


# ---------------------------------------------------------------------- cut by shard, in a real world

SIZES = (9, 7, 8)  # items of each rank's shard; a step takes 3, 2, 2: the second rank ends the epoch after three


def read_shards(folder: Path, runs: list[tuple[str, int, int, str]]) -> dict[str, Any]:
    """Each run (name, micro-batch, last step, on_resume) on this rank: its steps, or the DataError."""
    found: dict[str, Any] = {}
    for name, micro_batch, until, on_resume in runs:
        config = {
            "run": {"name": name, "dir": str(folder), "seed": SEED, "steps": until},
            "report": {"progress": False, "plot": False},
            "strategy": {"name": "ddp"},
        }
        steps: list[Any] = []
        try:
            with disttrain.Engine(config) as engine:
                engine.prepare("model", lambda: torch.nn.Linear(3, 1), lambda own: torch.optim.SGD(own, lr=0.1))
                for batches in engine.batches(
                    Sharded(SIZES), global_batch=7, micro_batch=micro_batch, on_resume=on_resume
                ):
                    assert batches.samples == 7
                    steps.append([(micro.index, micro.real, micro.batch.numpy()) for micro in batches])
                    engine.log()
                    if engine.should_stop():
                        break
            found[name] = steps
        except DataError as error:
            found[name] = str(error)
    return found


def rows_of_rank(step: list[tuple[int, bool, Any]]) -> list[list[float]]:
    return np.concatenate([batch for _, real, batch in step if real]).tolist()


def test_shards_are_read_by_one_rank_each_and_end_together(tmp_path: Path) -> None:
    ranks = run_world(
        3,
        read_shards,
        tmp_path,
        [("whole", 2, 5, "exact"), ("stopped", 1, 2, "exact"), ("stopped", 3, 5, "replay"), ("refused", 2, 2, "exact")],
    )
    shares = (3, 2, 2)
    for part, found in enumerate(ranks):
        for place, step in enumerate(found["whole"]):
            epoch, round_ = divmod(place, 3)
            numbers = [shares[part] * round_ + k for k in range(shares[part])]
            # Keyed by the number among all parts' items: the first items of two parts draw different numbers.
            expected_rows = [drawn(epoch, 3 * k + part, 100 * part + k).tolist() for k in numbers]
            assert rows_of_rank(step) == expected_rows, (part, place)
            assert [real for _, real, _ in step] == ([True, True] if part == 0 else [True, False])
        # Continued by reading again, with another micro-batch: each rank continues where it was in its shard.
        assert [rows_of_rank(step) for step in found["stopped"]] == [rows_of_rank(step) for step in found["whole"][2:]]
    for step in zip(*[found["whole"] for found in ranks], strict=True):
        places = [index for own in step for index, real, _ in own if real]
        assert len(set(places)) == len(places)

    exact = run_world(3, read_shards, tmp_path, [("refused", 2, 4, "exact")])
    fewer = run_world(2, read_shards, tmp_path, [("refused", 2, 4, "replay")])
    assert all(
        "at sample 14" in found["refused"] and "set data.on_resume=replay" in found["refused"] for found in exact
    )
    assert all(
        "over 3 data-parallel rank(s) at the time of saving, and over 2 now" in found["refused"] for found in fewer
    )


def test_a_dataset_that_can_be_sharded_is_complete_for_one_part() -> None:
    alone = make(Sharded((3, 5)), global_batch=4)
    steps = take(alone, 2)
    assert [[int(row[0]) for row in items] for items in joined([steps])] == [[0, 1, 2, 100], [101, 102, 103, 104]]
    cut = make(Sharded((3, 5)), (1, 2), global_batch=4, on_resume="replay")
    with pytest.raises(DataError, match=r"over 1 data-parallel rank\(s\) at the time of saving, and over 2 now"):
        cut.load_state_dict(alone.state_dict())


def test_a_collate_functions_draws_differ_between_parts() -> None:
    def noise(items: list[Tensor]) -> list[float]:
        return [float(torch.rand(())) for _ in items]

    for part in range(2):
        batches = make(Sharded((8, 8)), (part, 2), micro_batch=2, collate=noise)
        for place, (micro,) in enumerate(take(batches, 4)):
            # Keyed by the first item: the part's number 2 * place, among two parts' items.
            torch.manual_seed(keyed_seed(SEED, "collate", 0, 2 * (2 * place) + part))
            assert micro.batch == [float(torch.rand(())), float(torch.rand(()))]


def test_the_last_partial_step_of_shards_is_dropped_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    make(Sharded((3, 5)), (0, 2), last="drop")
    assert not caplog.records
    make(Sharded((3, 5)), (0, 2), last="short")
    assert "a dataset cut by shard ends with its last complete step instead" in caplog.text


class HuggingFace(Sharded):
    """`datasets.IterableDataset.shard(num_shards, index)`, with its arguments in the other order."""

    def shard(self, num_shards: int, index: int) -> Sharded:  # type: ignore[override]
        return Sharded(self.sizes, index)


def test_hugging_faces_shard_is_called_with_its_argument_names() -> None:
    batches = iter(make(HuggingFace((4, 4, 4)), (2, 3), global_batch=6))
    assert [int(row[0]) for micro in next(batches) for row in micro.batch] == [200, 201]


def test_map_style_data_with_a_shard_method_are_not_sharded_by_it() -> None:
    class Both(Augmented):
        def shard(self, index: int, count: int) -> Any:
            raise AssertionError("the order cuts map-style data")

    assert sum(len(items) for items in joined(steps_of_parts(lambda part: make(Both(8), part), 2, 2))) == 8
