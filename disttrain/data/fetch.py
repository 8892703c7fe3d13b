"""Fetches and collates batches by index, with random numbers keyed by (seed, epoch, index) for each item.

The first of three methods that a dataset has is used:

- `gather_batch(indices)` makes a complete batch from an int64 array. It is used only if the dataset states
  `draws_randomness = False`.
- `__getitems__(indices)` returns several items.
- `__getitem__(index)` returns one item.

Random numbers are exact with each method. A dataset that draws inside `__getitems__` is read item by item from then
on. The random numbers of a collate function are keyed by the first item of its batch. The code runs in the training
process or in a worker, and restores the generators afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from disttrain.errors import DataError, explain
from disttrain.runtime.seeds import restored_generators, seed_item

Collate = Callable[[list[Any]], Any]
Indices = Sequence[int] | NDArray[np.int64]


class Fetcher:
    """Fetches batches of a map-style dataset. Local. It can be pickled with its dataset, for workers."""

    def __init__(self, dataset: Any, *, seed: int, collate: Collate | None = None) -> None:
        self._dataset, self._seed = dataset, seed
        self._collate = collate
        self._plain = getattr(dataset, "draws_randomness", True) is False
        self._gather = None if collate is not None else getattr(dataset, "gather_batch", None)
        self._many = getattr(dataset, "__getitems__", None)
        self._one_by_one = self._many is None

    def fetch(self, epoch: int, wanted: NDArray[np.int64]) -> Any:
        """Return the collated batch of the items `wanted`. Errors of user code get a note that names the items."""
        if self._plain and self._gather is not None:
            return self._noted(self._gather, wanted, wanted, epoch)
        indices: list[int] = wanted.tolist()
        with nullcontext() if self._plain else restored_generators():
            items = self._items(epoch, indices)
        return self.collate(items, epoch, indices)

    def _items(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        if not self._one_by_one:
            if self._plain:
                return self._several(epoch, indices)
            seed_item(self._seed, epoch, indices[0])
            before = _generator_states()
            items = self._several(epoch, indices)
            if _generator_states() == before:
                return items
            self._one_by_one = True
        return [self._item(epoch, index) for index in indices]

    def _item(self, epoch: int, index: int) -> Any:
        if not self._plain:
            seed_item(self._seed, epoch, index)
        if self._many is not None:
            return self._several(epoch, [index])[0]
        return self._noted(self._dataset.__getitem__, index, [index], epoch)

    def _several(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        assert self._many is not None
        items = list(self._noted(self._many, list(indices), indices, epoch))
        if len(items) != len(indices):
            raise DataError(
                explain(
                    f"{type(self._dataset).__qualname__}.__getitems__ returned the wrong number of items.",
                    f"{len(items)} items for {len(indices)} indices",
                    "return a list with one item for each index, in the order of the indices",
                )
            )
        return items

    def _noted(
        self, get: Callable[[Any], Any], argument: Any, indices: Indices, epoch: int, act: str = "fetching"
    ) -> Any:
        try:
            return get(argument)
        except Exception as error:
            shown = ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
            which = f"{'index' if len(indices) == 1 else 'indices'} {shown}"
            error.add_note(f"while {act} {which} of {type(self._dataset).__qualname__} in epoch {epoch}")
            raise

    def collate(self, items: list[Any], epoch: int, indices: Sequence[int]) -> Any:
        """Return one batch of `items`. Raises DataError if torch's default collate function cannot combine them.

        A custom collate function may accept items of different shapes. Its errors are raised unchanged, with a note
        that names the items.
        """
        if self._collate is not None:
            with restored_generators():
                seed_item(self._seed, epoch, indices[0], "collate")
                return self._noted(self._collate, items, indices, epoch, "collating")
        try:
            return default_collate(items)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            shapes = [_shape(item) for item in items]
            odd = next((k for k, shape in enumerate(shapes) if shape != shapes[0]), None)
            problem = (
                f"item {indices[odd]} is {shapes[odd]}, item {indices[0]} is {shapes[0]}"
                if odd is not None
                else f"items of {shapes[0]}: {error}"
            )
            raise DataError(
                explain(
                    f"Cannot collate the items of {type(self._dataset).__qualname__} into a batch.",
                    problem,
                    "give all items the same shape, or set data.collate to a function from a list of items to a batch",
                )
            ) from error


def _generator_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)


def _shape(item: Any) -> Any:
    """Describe the shape and type that decide whether items can be collated, short enough for a message."""
    if isinstance(item, Tensor):
        return f"tensor {tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}"
    if isinstance(item, np.ndarray):
        return f"array {item.shape} {item.dtype}"
    if isinstance(item, dict):
        return {key: _shape(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        inner = [_shape(value) for value in item]
        # Shorten a list of equal entries: token ids would otherwise fill a thousand words.
        return f"{len(inner)} x {inner[0]}" if len(inner) > 4 and inner.count(inner[0]) == len(inner) else inner
    return type(item).__name__
