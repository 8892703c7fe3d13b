"""Reads iterable datasets: divides them over parts, counts samples, and resumes exactly or by reading again.

A dataset with `shard(index, count)` is cut, and each part reads its shard. Without `shard`, every part reads the
complete dataset and keeps its micro-batches, so that the sequence of samples is the same at any world size.

A dataset with `state_dict` and `load_state_dict` resumes exactly unless it is cut by `shard`, where each part would
have a different state. Cut datasets and datasets without a state are read again up to the position.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from disttrain.data.step_plan import MicroBatch, Slot, distinct, even_share, plan_share, plan_step
from disttrain.errors import DataError, explain
from disttrain.runtime.seeds import restored_generators, seed_item


class Stream:
    """One part's view of an iterable dataset. Local, except for `agree` in `steps`.

    Args:
        dataset: the iterable dataset.
        seed: the seed of each item's random numbers.
        part: (index, count) of the data-parallel coordinate.
        collate: makes a batch from (items, epoch, item numbers).
        exact: whether to reject a resume that cannot restore the position exactly.
        shards: if false, the dataset is read completely even if it has `shard`.
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
        # A cut dataset is a different sequence at each number of parts. Its saved position names the number.
        self._cut = part if shards and callable(getattr(dataset, "shard", None)) else (0, 1)
        self.sharded = self._cut[1] > 1
        self._dataset = _shard_of(dataset, part) if self.sharded else dataset
        self._seed, self._part, self._collate, self._exact = seed, part, collate, exact
        self._stateful = all(hasattr(self._dataset, name) for name in ("state_dict", "load_state_dict"))
        self._name = type(dataset).__qualname__
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Return the number of parts that the dataset is cut over, and the dataset's state that all parts share."""
        state: dict[str, Any] = {} if self._cut[1] == 1 else {"parts": self._cut[1]}
        if self._stateful and not self.sharded:
            state["stream"] = copy.deepcopy(self._dataset.state_dict())  # the dataset may change it while reading
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position. Raises DataError if that is not exact and data.on_resume=exact."""
        position, then, now = state["position"], state.get("parts", 1), self._cut[1]
        failed = f"Cannot continue {self._name} at sample {position}."
        if position and then != now:
            problem = f"shard cut it over {then} data-parallel rank(s) at the time of saving, and over {now} now"
            fix = f"continue on {then} rank(s): the position is valid only for that number"
            raise DataError(explain(failed, problem, fix))
        if "stream" in state and self._stateful and not self.sharded:
            self._set_epoch(state["epoch"])
            self._dataset.load_state_dict(state["stream"])
            self._loaded = True
        elif position and self._exact:
            problem = "shard cut it, so each part has a different state" if self.sharded else "no state of it was saved"
            fix = "" if self.sharded else "implement state_dict and load_state_dict, or "
            fix += "set data.on_resume=replay to read again up to this sample"
            raise DataError(explain(failed, problem, fix))

    def rewind(self) -> None:
        """Start the next epoch at the first item."""
        self._loaded = False

    def steps(
        self, epoch: int, skip: int, global_batch: int, micro_batch: int, *, drop: bool, agree: Callable[[int], int]
    ) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield (samples over all parts, this part's micro-batches) of each step, after the first `skip` samples.

        Collective for a dataset cut by `shard`: every part calls `agree` in each step.
        """
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
                # The first part that runs out ends the epoch for all. The others would wait in collectives for ever.
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
        """Yield the items from `number` on. Sets the random generators, which the caller restores."""
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
        """Return the number of this part's item among the items of all parts, so that no two share a seed."""
        return number * self._cut[1] + self._cut[0]

    def _set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(max(epoch, 0))  # evaluations use -1, and user code may use the epoch as a seed


def _shard_of(dataset: Any, part: tuple[int, int]) -> Any:
    index, count = part
    if "num_shards" in inspect.signature(dataset.shard).parameters:  # Hugging Face swaps the arguments
        return dataset.shard(num_shards=count, index=index)
    return dataset.shard(index, count)
