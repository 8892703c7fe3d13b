"""Data that can only be read from the front: cut over parts, counted, and resumed exactly or by reading again.

With `shard(index, count)` each part reads its own; without, every part reads all and keeps its micro-batches, so that
the sequence is one at any world size. A dataset with `state_dict` and `load_state_dict` resumes exactly, unless it is
cut by `shard` (each part's state is its own): that, and data without a state, are read again up to the position.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from disttrain.data.plan import MicroBatch, Slot, distinct, even_share, plan_share, plan_step
from disttrain.errors import DataError, explain
from disttrain.runtime.seeds import restored_generators, seed_item


class Stream:
    """One part's view of an iterable dataset; `shards=False` reads it whole even where it can be cut.

    `collate(items, epoch, numbers)` makes a batch. Local, but for `agree`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        part: tuple[int, int],
        collate: Callable[[list[Any], int, Sequence[int]], Any],
        exact: bool,
        shards: bool = True,
    ) -> None:
        # A dataset that can be cut is another sequence at every count: its positions say for which.
        self._cut = part if shards and callable(getattr(dataset, "shard", None)) else (0, 1)
        self.sharded = self._cut[1] > 1
        self._dataset = _shard_of(dataset, part) if self.sharded else dataset
        self._seed, self._part, self._collate, self._exact = seed, part, collate, exact
        self._stateful = all(hasattr(self._dataset, name) for name in ("state_dict", "load_state_dict"))
        self._name = type(dataset).__qualname__
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """What position means beyond a count: over how many parts it was cut, the state that all parts share."""
        found: dict[str, Any] = {} if self._cut[1] == 1 else {"parts": self._cut[1]}
        if self._stateful and not self.sharded:
            found["stream"] = copy.deepcopy(self._dataset.state_dict())  # reading on may change it
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError where the position cannot be found again exactly and data.on_resume=exact."""
        position, then, now = state["position"], state.get("parts", 1), self._cut[1]
        asked = f"{self._name} is to continue at sample {position}."
        if position and then != now:
            found = f"cut by shard over {then} data-parallel rank(s) then, over {now} now"
            raise DataError(explain(asked, found, f"continue on {then}: what each had read is known for that cut only"))
        if "stream" in state and self._stateful and not self.sharded:
            self._set_epoch(state["epoch"])
            self._dataset.load_state_dict(state["stream"])
            self._loaded = True
        elif position and self._exact:
            found = "it was cut by shard, each part with a state of its own" if self.sharded else "no saved state of it"
            do = "" if self.sharded else "give it state_dict and load_state_dict, or "
            raise DataError(explain(asked, found, f"{do}set data.on_resume=replay to read up to there again"))

    def rewind(self) -> None:
        """The next epoch begins at the front."""
        self._loaded = False

    def steps(
        self, epoch: int, skip: int, global_batch: int, micro_batch: int, *, drop: bool, agree: Callable[[int], int]
    ) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(samples over all parts, this part's micro-batches) until the stream ends, after the first `skip` samples."""
        share = even_share(global_batch, self._part) if self.sharded else global_batch
        number = skip // global_batch * share if self.sharded else skip
        items = self._items(epoch, number if self._loaded else 0)
        if not self._loaded:
            with restored_generators():
                deque(itertools.islice(items, number), maxlen=0)
        while True:
            with restored_generators():
                held = list(itertools.islice(items, share))
            if self.sharded:
                # A part that runs out ends the epoch for all: a lone part would wait for ever.
                samples = global_batch * agree(int(len(held) == share))
                slots = plan_share(samples, micro_batch, self._part) if samples else []
            else:
                samples = 0 if drop and len(held) < global_batch else len(held)
                slots = plan_step(samples, micro_batch, self._part)
            if not samples:
                return
            batches = {slot.index: self._batch(held, epoch, number, slot) for slot in distinct(slots)}
            yield samples, [MicroBatch(batches[slot.index], slot.index, slot.real, slot.count) for slot in slots]
            number += len(held)

    def _batch(self, held: list[Any], epoch: int, first: int, slot: Slot) -> Any:
        within = range(slot.start, slot.start + slot.count)
        return self._collate([held[k] for k in within], epoch, [self._key(first + k) for k in within])

    def _items(self, epoch: int, number: int) -> Iterator[Any]:
        """Items from `number` on; sets the generators, which who reads puts back."""
        if not self._loaded:
            self._set_epoch(epoch)
        seed_item(self._seed, epoch, -1)
        iterator = iter(self._dataset)
        while True:
            seed_item(self._seed, epoch, self._key(number))
            try:
                item = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                error.add_note(f"while reading item {number} of {self._name} in epoch {epoch}")
                raise
            number += 1
            yield item

    def _key(self, number: int) -> int:
        """The number of an item of this part's among all parts' items: no two share their draws."""
        return number * self._cut[1] + self._cut[0]

    def _set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(max(epoch, 0))  # an evaluation's is -1, which user code may pass on as a seed


def _shard_of(dataset: Any, part: tuple[int, int]) -> Any:
    index, count = part
    if "num_shards" in inspect.signature(dataset.shard).parameters:  # Hugging Face has them the other way round
        return dataset.shard(num_shards=count, index=index)
    return dataset.shard(index, count)
