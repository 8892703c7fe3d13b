"""The sequence of samples is the same at any world size, micro-batch and number of workers, and resumes anywhere."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import (
    SEED,
    Augmented,
    Columns,
    Numbers,
    chunks,
    generator_states,
    joined,
    steps_of_parts,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from disttrain.data import Batches, ByteText, Order, StepBatch
from disttrain.errors import ConfigError


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 50))
    return {
        "size": size,
        "global_batch": draw(st.integers(1, size)),
        "micro_batch": draw(st.integers(1, 20)),
        "shuffle": draw(st.booleans()),
        "last": draw(st.sampled_from(["short", "drop"])),
    }


def make(shape: dict[str, Any], part: tuple[int, int], **more: Any) -> Batches:
    options = {name: value for name, value in shape.items() if name != "size"}
    return Batches(Numbers(shape["size"]), seed=SEED, part=part, **options | more)


def expected(shape: dict[str, Any], count: int) -> list[tuple[int, list[int]]]:
    """(epoch, indices) of the first steps: slices of each epoch's order."""
    order = Order(shape["size"], SEED, shuffle=shape["shuffle"])
    epochs = ((epoch, order.indices(epoch, 0, shape["size"]).tolist()) for epoch in itertools.count())
    return list(itertools.islice(chunks(epochs, shape["global_batch"], drop=shape["last"] == "drop"), count))


def numbers(found: list[list[StepBatch]]) -> list[list[int]]:
    """Every step's items, over all parts."""
    return [[int(item) for item in items] for items in joined(found)]


@settings(max_examples=80, deadline=None)
@given(shapes(), st.integers(1, 4), st.integers(1, 9))
def test_parts_together_give_the_plain_order_step_by_step(shape: dict[str, Any], parts: int, count: int) -> None:
    found = steps_of_parts(lambda part: make(shape, part), parts, count)
    steps = expected(shape, count)
    assert numbers(found) == [items for _, items in steps]
    for own in found:
        assert [step.epoch for step in own] == [epoch for epoch, _ in steps], "no step crosses an epoch's end"
        assert all(micro.samples == len(micro.batch) <= shape["micro_batch"] for step in own for micro in step)


@settings(max_examples=80, deadline=None)
@given(shapes(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(1, 20))
def test_a_position_continues_at_any_other_world_size_and_micro_batch(
    shape: dict[str, Any], parts: int, later_parts: int, at: int, later_micro_batch: int
) -> None:
    first = make(shape, (0, parts))
    steps = take(first, at)
    state = json.loads(json.dumps(first.state_dict()))
    assert not steps or steps[-1].position == state, "a step carries the position after it"

    def resumed(part: tuple[int, int]) -> Batches:
        later = make(shape, part, micro_batch=later_micro_batch)
        later.load_state_dict(state)
        return later

    rest = steps_of_parts(resumed, later_parts, 5)
    assert numbers(rest) == [items for _, items in expected(shape, at + 5)[at:]]


@pytest.mark.parametrize("last", ["short", "drop"])
def test_workers_return_the_same_batches_in_the_same_order_from_any_position(last: str) -> None:
    shape = {"size": 23, "global_batch": 7, "micro_batch": 2, "shuffle": True, "last": last}
    steps = [items for _, items in expected(shape, 11)]
    assert numbers(steps_of_parts(lambda part: make(shape, part, workers=2), 2, 8)) == steps[:8]

    def resumed(part: tuple[int, int]) -> Batches:
        before = make(shape, part, workers=2, prefetch=4)
        take(before, 5)
        later = make(shape, part, workers=2)
        later.load_state_dict(before.state_dict())
        return later

    # Batches that workers fetched in advance are not part of the position.
    assert numbers(steps_of_parts(resumed, 2, 6)) == steps[5:11]


@pytest.mark.parametrize(
    ("size", "global_batch", "last", "steps"),
    [(10, 4, "short", 3), (10, 4, "drop", 2), (8, 4, "short", 2), (8, 8, "drop", 1)],
)
def test_an_epoch_has_as_many_steps_as_it_says(size: int, global_batch: int, last: str, steps: int) -> None:
    batches = Batches(Numbers(size), seed=0, global_batch=global_batch, micro_batch=3, part=(0, 1), last=last)
    assert batches.steps_per_epoch == steps
    assert [step.epoch for step in take(batches, 2 * steps)] == [0] * steps + [1] * steps


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_map_style_data(workers: int, tmp_path: Path) -> None:
    rows = torch.arange(60.0).reshape(30, 2)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(200)))

    def windows(indices: list[int]) -> list[Any]:
        starts = [5 * i for i in indices]
        return [[list(range(start + shift, start + shift + 5)) for start in starts] for shift in (0, 1)]

    cases: dict[str, tuple[Any, Callable[[list[int]], Any]]] = {
        "a list": (rows.tolist(), lambda i: [rows[i, 0].tolist(), rows[i, 1].tolist()]),
        "a tensor": (rows, lambda i: rows[i].tolist()),
        "TensorDataset": (TensorDataset(rows, rows[:, 0]), lambda i: [rows[i].tolist(), rows[i, 0].tolist()]),
        "Subset": (Subset(TensorDataset(torch.cat([-rows, rows])), range(30, 60)), lambda i: [rows[i].tolist()]),
        "ConcatDataset": (ConcatDataset([rows[:11], rows[11:]]), lambda i: rows[i].tolist()),
        "columns": (Columns(30), lambda i: {"text": [f"row {k}" for k in i], "label": i}),
        "columns, by Subset": (Subset(Columns(60), range(30)), lambda i: {"text": [f"row {k}" for k in i], "label": i}),
        "byte_text": (ByteText(str(text), 5, "all"), windows),
        "byte_text, by Subset": (Subset(ByteText(str(text), 5, "all"), range(30)), windows),
    }
    for name, (dataset, batch_of) in cases.items():
        batches = Batches(dataset, seed=SEED, global_batch=4, micro_batch=4, part=(0, 1), workers=workers)
        for place, (micro,) in enumerate(take(batches, 2)):
            indices = Order(len(dataset), SEED).indices(0, 4 * place, 4).tolist()
            assert plain(micro.batch) == batch_of(indices), name


def plain(batch: Any) -> Any:
    """Lists and dictionaries of numbers and text."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(value) for value in batch] if isinstance(batch, list | tuple) else batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_functions_batch_is_passed_unchanged(workers: int) -> None:
    batches = Batches(
        Numbers(9), seed=SEED, global_batch=3, micro_batch=3, part=(0, 1), workers=workers, collate=arrays_and_names
    )
    order = Order(9, SEED)
    for place, (micro,) in enumerate(take(batches, 2)):
        array, names = micro.batch
        assert isinstance(array, np.ndarray), "a DataLoader's own conversion would make it a tensor in workers only"
        assert array.tolist() == order.indices(0, 3 * place, 3).tolist()
        assert names == tuple(f"n{i}" for i in array)


def arrays_and_names(items: list[int]) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.array(items), tuple(f"n{i}" for i in items)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_users_generators_are_unchanged(workers: int) -> None:
    before = generator_states()
    take(Batches(Augmented(8), seed=SEED, global_batch=4, micro_batch=2, part=(0, 1), workers=workers), 3)
    assert generator_states() == before


def test_ctrl_c_is_handled_by_the_training_process_only() -> None:
    batches = Batches(Workers(40), seed=SEED, global_batch=4, micro_batch=1, part=(0, 1), workers=2, shuffle=False)
    steps = iter(batches)
    pids = {int(micro.batch) for micro in next(steps)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    # Two workers hold one step in advance. The later steps are requested after the signal.
    assert {int(micro.batch) for _ in range(4) for micro in next(steps)} == pids
    batches.close()


def test_workers_end_with_the_loop_that_they_work_for() -> None:
    steps = iter(Batches(Workers(40), seed=SEED, global_batch=4, micro_batch=1, part=(0, 1), workers=2))
    assert {int(micro.batch) for micro in next(steps)} == {child.pid for child in multiprocessing.active_children()}
    del steps  # like a `break`
    assert not multiprocessing.active_children()


class Workers(Numbers):
    """Items are the ids of the processes that made them."""

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"global_batch": 0}, "global_batch=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"micro_batch": -2}, "micro_batch=-2"),
        ({"last": "keep"}, "data.last is unknown.\n  problem: 'keep' is neither short nor drop"),
        ({"on_resume": "skip"}, "data.on_resume is unknown.\n  problem: 'skip' is neither exact nor replay"),
    ],
)
def test_a_setting_without_effect_is_rejected(setting: dict[str, Any], said: str) -> None:
    known: dict[str, Any] = {"seed": 0, "global_batch": 4, "micro_batch": 2, "part": (0, 1)}
    with pytest.raises(ConfigError) as refused:
        Batches(Numbers(8), **known | setting)
    assert said in str(refused.value)
