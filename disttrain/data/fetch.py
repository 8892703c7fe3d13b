"""From indices to a collated batch, with every item's randomness keyed by (seed, epoch, index).

Three ways in, the first that a dataset has: `gather_batch(indices)` makes the batch itself of an int64 array (only of
data that say `draws_randomness = False`), `__getitems__` brings many items, `__getitem__` one. Draws are exact in all
of them: a dataset that is seen to draw inside `__getitems__` is asked item by item from then on. A collate function's
draws are keyed by its batch's first item. Runs in this process or in a worker; puts the generators back as found.
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
    """Batches of a map-style dataset. Local; pickles with its dataset, for workers."""

    def __init__(self, dataset: Any, *, seed: int, collate: Collate | None = None) -> None:
        self._dataset, self._seed = dataset, seed
        self._collate = collate
        self._plain = getattr(dataset, "draws_randomness", True) is False
        self._gather = None if collate is not None else getattr(dataset, "gather_batch", None)
        self._many = getattr(dataset, "__getitems__", None)
        self._one_by_one = self._many is None

    def fetch(self, epoch: int, wanted: NDArray[np.int64]) -> Any:
        """The collated batch of these items. User code's exceptions come through with a note of where."""
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
                    f"{type(self._dataset).__qualname__}.__getitems__ was asked for {len(indices)} items.",
                    f"{len(items)} came back",
                    "let it return a list with one item for every index, in their order",
                )
            )
        return items

    def _noted(self, get: Callable[[Any], Any], asked: Any, indices: Indices, epoch: int, act: str = "fetching") -> Any:
        try:
            return get(asked)
        except Exception as error:
            shown = ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
            which = f"{'index' if len(indices) == 1 else 'indices'} {shown}"
            error.add_note(f"while {act} {which} of {type(self._dataset).__qualname__} in epoch {epoch}")
            raise

    def collate(self, items: list[Any], epoch: int, indices: Sequence[int]) -> Any:
        """One batch of items. Raises DataError where torch's default rule finds them different in shape.

        A collate function may well take different shapes: its errors come through as they are, with a note of where.
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
            found = (
                f"item {indices[odd]} is {shapes[odd]}, item {indices[0]} is {shapes[0]}"
                if odd is not None
                else f"items of {shapes[0]}: {error}"
            )
            raise DataError(
                explain(
                    f"The items of {type(self._dataset).__qualname__} are to be put into one batch.",
                    found,
                    "give all items one shape, or name data.collate: a function from a list of items to a batch",
                )
            ) from error


def _generator_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)


def _shape(item: Any) -> Any:
    """What decides whether items fit together, in words short enough for a message."""
    if isinstance(item, Tensor):
        return f"tensor {tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}"
    if isinstance(item, np.ndarray):
        return f"array {item.shape} {item.dtype}"
    if isinstance(item, dict):
        return {key: _shape(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        inner = [_shape(value) for value in item]
        # A list of token ids is one shape, not a thousand words.
        return f"{len(inner)} x {inner[0]}" if len(inner) > 4 and inner.count(inner[0]) == len(inner) else inner
    return type(item).__name__
