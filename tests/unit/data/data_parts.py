"""Datasets as users write them, with the expected items computed without disttrain."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from disttrain.data import Batches, StepBatch

SEED = 7


def keyed_seed(seed: int, *keys: int | str) -> int:
    """BLAKE2b over length, kind and bytes of every key, cut to 63 bits."""
    text = b""
    for key in (seed, *keys):
        raw = key.encode() if isinstance(key, str) else struct.pack("<q", key)
        text += bytes([len(raw), isinstance(key, int)]) + raw
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") // 2


def draw(number: float) -> Tensor:
    """An item with its number and draws from the three generators that user code uses."""
    return torch.stack([torch.tensor(float(number)), torch.rand(()), torch.tensor(np.random.rand() + random.random())])


def drawn(epoch: int, index: int, number: float | None = None) -> Tensor:
    """The result of `draw` for item `index`, with each generator seeded by hand."""
    key = keyed_seed(SEED, "item", epoch, index)
    torch.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)
    return draw(index if number is None else number)


class Numbers(Dataset):
    """Item i is i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Augmented(Numbers):
    """Item i is i and its random numbers."""

    def __getitem__(self, index: int) -> Tensor:
        return draw(index)


class AugmentedInBulk(Augmented):
    """The same through `__getitems__`, drawing only for items divisible by `every`."""

    def __init__(self, size: int, every: int = 1) -> None:
        super().__init__(size)
        self.every = every
        self.asked: list[int] = []

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        self.asked.append(len(indices))
        return [draw(i) if i % self.every == 0 else torch.full((3,), float(i)) for i in indices]


class Columns:
    """Rows as dictionaries over columns, read by number or by list, like Hugging Face's `Dataset`."""

    def __init__(self, size: int) -> None:
        self.columns = {"text": [f"row {i}" for i in range(size)], "label": list(range(size))}

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, key: int | list[int]) -> dict[str, Any]:
        if isinstance(key, int):
            return {name: column[key] for name, column in self.columns.items()}
        return {name: [column[i] for i in key] for name, column in self.columns.items()}

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        found = self[keys]
        return [{name: column[k] for name, column in found.items()} for k in range(len(keys))]


class Reader(IterableDataset):
    """Items from the front, without a state. `first` distinguishes the items of streams."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __iter__(self) -> Iterator[Tensor]:
        return (draw(self.first + k) for k in range(self.size))


class Resumable(IterableDataset):
    """Keeps its position in one dictionary that it modifies, and its epoch. Item k of epoch e is 1000 e + k."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch, self.state, self.read = size, 0, {"at": 0}, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.state["at"] = epoch, 0

    def __iter__(self) -> Iterator[Tensor]:
        for k in range(self.state["at"], self.size):
            self.state["at"] = k + 1
            self.read += 1
            yield draw(1000 * self.epoch + k)

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)


class Sharded(IterableDataset):
    """Part i of n has `sizes[i]` items, numbered from 100 i, so that an item shows its part."""

    def __init__(self, sizes: Sequence[int], shard: int | None = None) -> None:
        self.sizes, self.own = sizes, shard

    def shard(self, index: int, count: int) -> Sharded:
        assert index < count
        return Sharded(self.sizes, index)

    def __iter__(self) -> Iterator[Tensor]:
        whose = range(len(self.sizes)) if self.own is None else [self.own]
        return (draw(100 * part + k) for part in whose for k in range(self.sizes[part]))


def take(batches: Batches, count: int) -> list[StepBatch]:
    """The next `count` steps. Workers are ended."""
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def steps_of_parts(make: Callable[[tuple[int, int]], Batches], parts: int, count: int) -> list[list[StepBatch]]:
    """`count` steps of every part, as result[part][step]."""
    return [take(make((part, parts)), count) for part in range(parts)]


def joined(found: Sequence[Sequence[StepBatch]]) -> list[list[Any]]:
    """Every step's items in the order of the global batch, from all parts' micro-batches except replays."""
    steps = []
    for by_part in zip(*found, strict=True):
        assert len({len(step) for step in by_part}) == 1, "parts with different numbers of micro-batches would deadlock"
        real = sorted((micro for step in by_part for micro in step if micro.real), key=lambda micro: micro.index)
        assert [micro.index for micro in real] == list(range(len(real)))
        items = [item for micro in real for item in micro.batch]
        assert {step.samples for step in by_part} == {len(items)}
        steps.append(items)
    return steps


def chunks(epochs: Iterable[tuple[int, Sequence[Any]]], size: int, *, drop: bool = False) -> Iterator[tuple[int, Any]]:
    """(epoch, items) of every step: plain slices of each epoch's items. No step crosses an epoch's end."""
    for epoch, items in epochs:
        for start in range(0, len(items), size):
            if not drop or start + size <= len(items):
                yield epoch, items[start : start + size]


def generator_states() -> tuple[Any, ...]:
    """The states of the three global generators, comparable."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest
