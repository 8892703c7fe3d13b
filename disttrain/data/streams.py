"""Data that can only be read from the front: cut over parts, counted, and resumed exactly or by reading again.

With `shard(index, count)` each part reads its own; without, every part reads all and keeps its micro-batches, so that
the sequence is one at any world size. A dataset with `state_dict` and `load_state_dict` resumes exactly, unless it is
cut by `shard` (each part's state is its own): that, and data without a state, are read again up to the position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from disttrain.data.plan import MicroBatch, plan_step
from disttrain.errors import DataError, explain
from disttrain.runtime.seeds import restored_generators, seed_item


class Stream:
    """One part's view of an iterable dataset. Local, but for `agree`."""

    def __init__(
        self, dataset: Any, *, seed: int, part: tuple[int, int], collate: Callable[[list[Any], Any], Any], exact: bool
    ) -> None:
        shard = getattr(dataset, "shard", None)
        self._sharded = callable(shard) and part[1] > 1
        self._dataset = shard(*part) if self._sharded and shard is not None else dataset
        self._seed, self._part, self._collate, self._exact = seed, part, collate, exact
        self._stateful = all(hasattr(self._dataset, name) for name in ("state_dict", "load_state_dict"))
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """What position means beyond a count: the dataset's own state where all parts share it."""
        if self._stateful and not self._sharded:
            return {"stream": self._dataset.state_dict()}
        return {"parts": self._part[1]} if self._sharded else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError where the position cannot be found again exactly and data.on_resume=exact."""
        if "stream" in state and self._stateful and not self._sharded:
            self._dataset.load_state_dict(state["stream"])
            self._loaded = True
            return
        parts = state.get("parts", self._part[1])
        if state["position"] and (self._exact or parts != self._part[1]):
            found = (
                "no state_dict and load_state_dict"
                if not self._stateful
                else "cut by shard, each part a state of its own"
            )
            if parts != self._part[1]:
                found = f"cut over {parts} parts then, {self._part[1]} now"
            raise DataError(
                explain(
                    f"{type(self._dataset).__qualname__} is to continue at sample {state['position']}.",
                    found,
                    "give it state_dict and load_state_dict, or set data.on_resume=replay to read up to there again",
                )
            )

    def rewind(self) -> None:
        """The next epoch begins at the front."""
        self._loaded = False

    def steps(
        self, epoch: int, skip: int, global_batch: int, micro_batch: int, *, drop: bool, agree: Callable[[int], int]
    ) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(samples over all parts, this part's micro-batches) until the stream ends, after the first `skip` samples."""
        items = self._items(epoch, skip if self._loaded else 0)
        if skip and not self._loaded:
            for _ in range(skip // self._part[1] if self._sharded else skip):
                next(items, None)
        number = skip
        while True:
            if self._sharded:
                found = self._own_share(items, global_batch, micro_batch, agree)
                samples = global_batch if found else 0
            else:
                held = [item for _, item in zip(range(global_batch), items, strict=False)]
                samples = 0 if drop and len(held) < global_batch else len(held)
                slots = plan_step(samples, micro_batch, self._part) if samples else []
                found = [
                    MicroBatch(
                        self._batch(held[s.start : s.start + s.count], number + s.start), s.index, s.real, s.count
                    )
                    for s in slots
                ]
            if not found:
                return
            number += samples
            yield samples, found

    def _own_share(
        self, items: Iterator[Any], global_batch: int, micro_batch: int, agree: Callable[[int], int]
    ) -> list[MicroBatch]:
        slots = plan_step(global_batch, micro_batch, self._part)
        needed = [slot for slot in slots if slot.real] or slots[:1]
        held = [item for _, item in zip(range(sum(slot.count for slot in needed)), items, strict=False)]
        # A part that runs out ends the epoch for all: a lone part would wait for ever.
        if not agree(int(len(held) == sum(slot.count for slot in needed))):
            return []
        batches, at = {}, 0
        for slot in needed:
            batches[slot.index] = self._batch(held[at : at + slot.count], at)
            at += slot.count
        return [MicroBatch(batches[slot.index], slot.index, slot.real, slot.count) for slot in slots]

    def _batch(self, items: list[Any], first: int) -> Any:
        return self._collate(items, range(first, first + len(items)))

    def _items(self, epoch: int, number: int) -> Iterator[Any]:
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if callable(set_epoch) and not self._loaded:
            set_epoch(epoch)
        with restored_generators():
            seed_item(self._seed, epoch, -1)
            iterator = iter(self._dataset)
        while True:
            with restored_generators():
                seed_item(self._seed, epoch, number)
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            number += 1
            yield item
