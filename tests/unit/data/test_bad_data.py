"""Data that cannot form a step: a DataError with the problem, or the user's error with its position."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from data_parts import SEED, Numbers, take
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from disttrain.data import Batches
from disttrain.errors import DataError


def read(dataset: Any, steps: int = 3, **more: Any) -> Any:
    options: dict[str, Any] = {"seed": SEED, "global_batch": 4, "micro_batch": 4, "part": (0, 1), "shuffle": False}
    return take(Batches(dataset, **options | more), steps)


def rejection(dataset: Any, **more: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(dataset, **more)
    return str(refused.value)


def test_too_little_data() -> None:
    assert "Cannot fill a step of data.global_batch=4 samples.\n  problem: Numbers is empty" in rejection(Numbers(0))
    assert "problem: Numbers has 3\n  fix: lower data.global_batch" in rejection(Numbers(3))
    assert "problem: list is empty" in rejection([])


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(int, 1)


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (None, "problem: a NoneType"),
        (7, "problem: a int"),
        (test_too_little_data, "problem: a function"),
        (Numbers, "problem: the class Numbers, not an instance of it"),
        (Endless, "problem: the class Endless, not an instance of it"),
        (DataLoader(Numbers(8)), "problem: a DataLoader\n  fix: provide the DataLoader's dataset"),
    ],
)
def test_objects_that_are_no_dataset(thing: Any, said: str) -> None:
    message = rejection(thing)
    assert message.startswith("A dataset needs __len__ and __getitem__, or __iter__")
    assert said in message


class Ragged(Numbers):
    """Item 6 has another shape."""

    def __init__(self, item: Any, odd: Any) -> None:
        super().__init__(12)
        self.item, self.odd = item, odd

    def __getitem__(self, index: int) -> Any:
        return self.odd if index == 6 else self.item


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("item", "odd", "said"),
    [
        (torch.zeros(3), torch.zeros(4), "item 6 is tensor (4,) float32, item 4 is tensor (3,) float32"),
        (
            (torch.zeros(2, 2), 1),
            (torch.zeros(2, 1), 1),
            "item 6 is ['tensor (2, 1) float32', 'int'], item 4 is ['tensor (2, 2) float32', 'int']",
        ),
        ({"x": 1, "y": 2}, {"x": 1}, "item 6 is {'x': 'int'}, item 4 is {'x': 'int', 'y': 'int'}"),
        (torch.zeros(1), None, "item 6 is NoneType, item 4 is tensor (1,) float32"),
        # Token ids: one line in the message, not five hundred.
        ({"ids": [1] * 500}, {"ids": [1] * 400}, "item 6 is {'ids': '400 x int'}, item 4 is {'ids': '500 x int'}"),
    ],
)
def test_items_of_different_shape_are_named(item: Any, odd: Any, said: str, workers: int) -> None:
    message = rejection(Ragged(item, odd), workers=workers)
    assert message.startswith("Cannot collate the items of Ragged into a batch.\n"), "no worker's traceback before it"
    assert f"problem: {said}\n" in message
    assert "data.collate" in message


def test_items_that_cannot_form_a_batch() -> None:
    assert "problem: items of object: default_collate" in rejection([object()] * 8)


class Items(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.zeros(4 if k == 6 else 3) for k in range(12))


def test_items_of_different_shape_in_a_stream_are_named() -> None:
    assert "item 6 is tensor (4,) float32, item 4 is tensor (3,) float32" in rejection(Items())


class Short(Numbers):
    def __getitems__(self, indices: Sequence[int]) -> list[int]:
        return list(indices)[:-1]


def test_fewer_items_than_asked_for() -> None:
    assert "Short.__getitems__ returned the wrong number of items.\n  problem: 3 items for 4 indices" in rejection(
        Short(8)
    )


class TwoPartError(Exception):
    """Cannot be constructed from one text, which a DataLoader would try."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)


class Broken(Numbers):
    """Item 6 cannot be read."""

    def __init__(self, error: Exception) -> None:
        super().__init__(12)
        self.error = error

    def __getitem__(self, index: int) -> int:
        if index == 6:
            raise self.error
        return index


class BrokenInBulk(Broken):
    def __getitems__(self, indices: Sequence[int]) -> list[int]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("error", [OSError("no such picture"), RuntimeError("bad record"), KeyError("label")])
def test_errors_of_user_code_are_raised_with_the_position(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        read(Broken(error))
    assert raised.value is error
    assert error.__notes__ == ["while fetching index 6 of Broken in epoch 0"]

    with pytest.raises(type(error)) as raised:
        read(Broken(type(error)(*error.args)), workers=2)
    assert type(raised.value) is not DataError
    told = str(raised.value)
    assert "while fetching index 6 of Broken in epoch 0" in told
    assert str(error) in told
    assert "raise self.error" in told, "the user's own line"


@pytest.mark.parametrize("workers", [0, 2])
def test_items_requested_together_are_named_by_the_first(workers: int) -> None:
    with pytest.raises(OSError) as raised:
        read(BrokenInBulk(OSError("gone")), steps=1, global_batch=11, micro_batch=11, workers=workers)
    told = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert "while fetching indices 0, 1, 2, 3, 4, 5, 6, 7 and 3 more of BrokenInBulk in epoch 0" in told


def test_an_error_that_cannot_cross_processes_is_reported_too() -> None:
    with pytest.raises(TwoPartError):
        read(Broken(TwoPartError(5, "torn")))
    with pytest.raises(RuntimeError, match=r"(?s)TwoPartError.*torn.*while fetching index 6"):
        read(Broken(TwoPartError(5, "torn")), workers=2)


def pad_badly(items: list[Any]) -> Any:
    raise ValueError("no padding token")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_collate_function_is_not_attributed_to_shapes(workers: int) -> None:
    with pytest.raises(ValueError, match="no padding token") as raised:
        read(Ragged([1, 2], [1]), collate=pad_badly, workers=workers)
    told = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert "while collating indices 0, 1, 2, 3 of Ragged in epoch 0" in told


class Killed(Numbers):
    """The process that fetches item 9 dies."""

    def __getitem__(self, index: int) -> int:
        if index == 9 and get_worker_info() is not None:
            # until the other side waits for it, because torch may report a death anywhere in that process
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_reported_with_the_fix() -> None:
    message = rejection(Killed(12), workers=2, prefetch=1)
    assert (
        "A worker process (data.workers) that fetched items of Killed died.\n  problem: DataLoader worker (pid"
        in message
    )
    assert "set data.workers=0" in message
    assert [int(i) for (micro,) in read(Killed(12)) for i in micro.batch] == list(range(12))
