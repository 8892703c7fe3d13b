"""The random numbers of an item depend on (seed, epoch, index), not on workers, ranks, batches or resumes."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import (
    SEED,
    Augmented,
    AugmentedInBulk,
    Numbers,
    chunks,
    drawn,
    joined,
    keyed_seed,
    steps_of_parts,
    take,
)
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from world import run_world

import disttrain
from disttrain.data import Batches, Order

SIZE, GLOBAL_BATCH = 20, 6  # four steps per epoch, the last one with two samples

DATASETS: dict[str, Callable[[], Any]] = {
    "item by item": lambda: Augmented(SIZE),
    "in bulk": lambda: AugmentedInBulk(SIZE),
    "Subset": lambda: Subset(Augmented(SIZE), range(SIZE)),
    "Subset in bulk": lambda: Subset(AugmentedInBulk(SIZE), range(SIZE)),
}


def expected_steps(count: int, size: int = SIZE) -> list[list[Tensor]]:
    """The rows of every step, each drawn by hand under its seeds."""
    order = Order(size, SEED)
    epochs = ((epoch, order.indices(epoch, 0, size).tolist()) for epoch in itertools.count())
    steps = itertools.islice(chunks(epochs, GLOBAL_BATCH), count)
    return [[drawn(epoch, index) for index in indices] for epoch, indices in steps]


def assert_rows(found: list[list[Any]], steps: list[list[Tensor]]) -> None:
    assert [torch.stack(list(rows)).tolist() for rows in found] == [torch.stack(rows).tolist() for rows in steps]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", DATASETS)
def test_every_form_of_access_gives_the_same_draws(name: str, workers: int) -> None:
    def make(part: tuple[int, int]) -> Batches:
        dataset = DATASETS[name]()
        return Batches(dataset, seed=SEED, global_batch=GLOBAL_BATCH, micro_batch=2, part=part, workers=workers)

    assert_rows(joined(steps_of_parts(make, 2, 6)), expected_steps(6))


def test_items_of_parts_of_a_dataset_are_keyed_by_their_index_in_the_complete_dataset() -> None:
    dataset = ConcatDataset([Augmented(7), Augmented(13)])
    batches = Batches(dataset, seed=SEED, global_batch=SIZE, micro_batch=SIZE, part=(0, 1), shuffle=False)
    ((micro,),) = take(batches, 1)
    expected = [drawn(0, index, index if index < 7 else index - 7) for index in range(SIZE)]
    assert micro.batch.tolist() == torch.stack(expected).tolist()


def test_a_dataset_that_seldom_draws_is_exact_from_any_position() -> None:
    def row(epoch: int, index: int) -> Tensor:
        return drawn(epoch, index) if index % 7 == 0 else torch.full((3,), float(index))

    order = Order(SIZE, SEED)
    for start in range(4):
        batches = Batches(AugmentedInBulk(SIZE, 7), seed=SEED, global_batch=5, micro_batch=5, part=(0, 1))
        batches.load_state_dict({"epoch": 1, "position": 5 * start})
        for place, (micro,) in enumerate(take(batches, 4 - start), start):
            rows = [row(1, index) for index in order.indices(1, 5 * place, 5).tolist()]
            assert micro.batch.tolist() == torch.stack(rows).tolist()


def test_only_data_that_draw_are_read_item_by_item() -> None:
    still, drawing = AugmentedInBulk(SIZE, every=SIZE), AugmentedInBulk(SIZE)
    for dataset in (still, drawing):
        without_the_first = Subset(dataset, range(1, SIZE))
        take(Batches(without_the_first, seed=SEED, global_batch=9, micro_batch=9, part=(0, 1), last="drop"), 2)
    assert still.asked == [9, 9]
    assert drawing.asked == [9] + [1] * 18


def noisy(items: list[int]) -> Tensor:
    """A collate function that draws, like one that masks tokens."""
    return torch.tensor([[float(i), float(torch.rand(())), np.random.rand(), random.random()] for i in items])


def expected_noisy(epoch: int, indices: list[int]) -> list[list[float]]:
    key = keyed_seed(SEED, "collate", epoch, indices[0])
    torch.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)
    return noisy(indices).tolist()


class Still(Numbers):
    draws_randomness = False


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbers, Still])
def test_a_collate_functions_draws_depend_only_on_its_items(kind: type[Numbers], workers: int) -> None:
    order = Order(SIZE, SEED)
    for start in (0, 2):
        batches = Batches(
            kind(SIZE), seed=SEED, global_batch=5, micro_batch=5, part=(0, 1), workers=workers, collate=noisy
        )
        batches.load_state_dict({"epoch": 3, "position": 5 * start})
        for place, (micro,) in enumerate(take(batches, 2), start):
            assert micro.batch.tolist() == expected_noisy(3, order.indices(3, 5 * place, 5).tolist())


# ---------------------------------------------------------------------- in real worlds, through the engine


def train_in_world(folder: Path, runs: list[tuple[str, int, int, int]]) -> dict[str, list[list[tuple[int, Any]]]]:
    """Each run (name, workers, micro-batch, last step): the real micro-batches of every step on this rank, (index,
    rows).
    """
    multiprocessing.current_process().daemon = False  # a daemon may have no workers
    found = {}
    for name, workers, micro_batch, until in runs:
        config = {
            "run": {"name": name, "dir": str(folder), "seed": SEED, "steps": until},
            "report": {"progress": False, "plot": False},
            "strategy": {"name": "ddp"},
        }
        with disttrain.Engine(config) as engine:
            engine.prepare("model", lambda: torch.nn.Linear(3, 1), lambda own: torch.optim.SGD(own, lr=0.1))
            steps = []
            for batches in engine.batches(
                Augmented(SIZE), global_batch=GLOBAL_BATCH, micro_batch=micro_batch, workers=workers
            ):
                steps.append([(micro.index, micro.batch.numpy()) for micro in batches if micro.real])
                engine.accumulate("model", batches, lambda model, batch: (model(batch).sum(), len(batch)))
                engine.step("model")
                engine.log()
                if engine.should_stop():
                    break
        found[name] = steps
    return found


@pytest.mark.slow
def test_draws_are_equal_at_any_world_size_with_workers_and_after_a_resume(tmp_path: Path) -> None:
    found: dict[str, list[list[Tensor]]] = {}

    def run(size: int, runs: list[tuple[str, int, int, int]]) -> None:
        ranks = run_world(size, train_in_world, tmp_path, runs)
        for name, *_ in runs:
            for by_rank in zip(*[rank[name] for rank in ranks], strict=True):
                micro = sorted((one for own in by_rank for one in own), key=lambda one: one[0])
                found.setdefault(name, []).append(list(torch.from_numpy(np.concatenate([rows for _, rows in micro]))))

    run(1, [("alone", 0, 6, 6), ("grows", 2, 3, 3)])
    run(3, [("three", 0, 1, 6), ("grows", 2, 2, 6)])
    for name, rows in found.items():
        assert len(rows) == 6, name
        assert_rows(rows, expected_steps(6))
