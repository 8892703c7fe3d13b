"""A part's micro-batches, step after step, from any position: the same samples at any world size and worker count.

The sequence is a function of (seed, epoch, position); the mesh, the micro-batch and the workers only decide who fetches
what. A step never crosses an epoch's end: the last one is short, or dropped. Refuses data that cannot fill a step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from disttrain.data.fetch import Collate, Fetcher
from disttrain.data.order import Order
from disttrain.data.plan import MicroBatch, Slot, StepBatch, distinct, plan_step
from disttrain.data.streams import Stream
from disttrain.errors import ConfigError, DataError, explain
from disttrain.logs import package_logger


class Batches:
    """Endless steps of one part; `state_dict` is the position after the last step that was yielded.

    `part` is (index, count) of the data-parallel coordinate; `agree` a minimum over parts, called once a step by
    streams that were cut with `shard`; these end an epoch with the last step that every part can fill. Local otherwise.
    Raises ConfigError for a setting that means nothing, DataError for no dataset and for empty or too small data.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        part: tuple[int, int],
        shuffle: bool = True,
        last: str = "short",
        workers: int = 0,
        prefetch: int = 2,
        collate: Collate | None = None,
        on_resume: str = "exact",
        agree: Callable[[int], int] = lambda value: value,
    ) -> None:
        _check_settings(global_batch=global_batch, micro_batch=micro_batch, last=last, on_resume=on_resume)
        self._global_batch, self._micro_batch, self._part = global_batch, micro_batch, part
        self._drop = last == "drop"
        self._workers, self._prefetch = workers, prefetch
        self._epoch, self._position = 0, 0
        self._stream: Stream | None = None
        self._loading: Iterator[Any] = iter(())
        self._name = type(dataset).__qualname__
        self._fetcher = Fetcher(dataset, seed=seed, collate=collate)
        if is_stream(dataset):
            if workers:
                package_logger("data").warning(
                    "data.workers=%d: iterable data are read in the training process", workers
                )
            self._stream = Stream(
                dataset, seed=seed, part=part, collate=self._fetcher.collate, exact=on_resume == "exact"
            )
            self._agree = agree
            if self._stream.sharded and not self._drop:
                package_logger("data").warning("data.last=short: data cut by shard end with their last whole step")
            return
        size = len(dataset)
        if size < global_batch:
            raise DataError(
                explain(
                    f"data.global_batch={global_batch} samples make a step.",
                    f"{self._name} has {size}" if size else f"{self._name} is empty",
                    "lower data.global_batch, or give more data" if size else "give data with at least one step in it",
                )
            )
        self._order = Order(size, seed, shuffle=shuffle)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps in an epoch; None for streams."""
        if self._stream is not None:
            return None
        whole, rest = divmod(self._order.size, self._global_batch)
        return whole + (1 if rest and not self._drop else 0)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last yielded step, as JSON; independent of parts, micro-batch and workers."""
        found: dict[str, Any] = {"epoch": self._epoch, "position": self._position}
        return found if self._stream is None else found | self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter`."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        if self._stream is not None:
            self._stream.load_state_dict(state)

    def __iter__(self) -> Iterator[StepBatch]:
        return self._streamed() if self._stream is not None else self._indexed()

    def close(self) -> None:
        """End the workers."""
        _end_workers(self._loading)

    # ------------------------------------------------------------------ map-style data

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, first position, samples) of every step from here on."""
        epoch, position, size = self._epoch, self._position, self._order.size
        while True:
            samples = min(self._global_batch, size - position)
            if samples <= 0 or (self._drop and samples < self._global_batch):
                epoch, position = epoch + 1, 0
                continue
            yield epoch, position, samples
            position += samples

    def _requests(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, first position, count) of every batch to fetch, replays of an own one left out."""
        for epoch, start, samples in self._steps():
            for slot in _planned(samples, self._micro_batch, self._part)[1]:
                yield epoch, start + slot.start, slot.count

    def _loaded(self, asked: _Asked) -> Iterator[Any] | None:
        """What the workers bring, in the order of `_requests`; None without any."""
        if self._workers == 0:
            return None
        loader: DataLoader[Any] = DataLoader(
            asked,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Endless(self._requests),
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),  # its own: starting workers draws nothing from the user's
        )
        self._loading = iter(loader)
        return self._loading

    def _indexed(self) -> Iterator[StepBatch]:
        asked = _Asked(self._order, self._fetcher)
        loaded = self._loaded(asked)
        try:
            for epoch, start, samples in self._steps():
                slots, fetch = _planned(samples, self._micro_batch, self._part)
                batches = {}
                for slot in fetch:
                    request = epoch, start + slot.start, slot.count
                    batches[slot.index] = asked[request] if loaded is None else _next(loaded, self._name)
                found = [MicroBatch(batches[slot.index], slot.index, slot.real, slot.count) for slot in slots]
                self._epoch, self._position = epoch, start + samples
                yield StepBatch(found, epoch=epoch, samples=samples, position=self.state_dict())
        finally:
            _end_workers(loaded)  # left to the garbage collector, each takes five seconds

    # ------------------------------------------------------------------ streams

    def _streamed(self) -> Iterator[StepBatch]:
        assert self._stream is not None
        while True:
            for samples, micro_batches in self._stream.steps(
                self._epoch, self._position, self._global_batch, self._micro_batch, drop=self._drop, agree=self._agree
            ):
                self._position += samples
                yield StepBatch(micro_batches, epoch=self._epoch, samples=samples, position=self.state_dict())
            if self._position == 0:
                raise DataError(
                    explain(
                        f"data.global_batch={self._global_batch} samples make a step.",
                        f"{self._name} ended before it gave one, in epoch {self._epoch}",
                        "give more data, lower data.global_batch, or set data.last=short; its __iter__ starts anew "
                        "every epoch",
                    )
                )
            self._epoch, self._position = self._epoch + 1, 0
            self._stream.rewind()


@lru_cache(maxsize=16)
def _planned(samples: int, micro_batch: int, part: tuple[int, int]) -> tuple[list[Slot], list[Slot]]:
    """A step's slots and those of them to fetch: the same step after step, but for an epoch's last."""
    slots = plan_step(samples, micro_batch, part)
    return slots, distinct(slots)


class _Asked:
    """What a worker is asked: a batch by (epoch, first position, count)."""

    def __init__(self, order: Order, fetcher: Fetcher) -> None:
        self._order, self._fetcher = order, fetcher

    def __getitem__(self, request: tuple[int, int, int]) -> Any:
        epoch, start, count = request
        try:
            return self._fetcher.fetch(epoch, self._order.indices(epoch, start, count))
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error  # raised in here, its message would become the worker's traceback


class _Endless:
    """A sampler that starts from the position at which it is asked to."""

    def __init__(self, requests: Callable[[], Iterator[tuple[int, int, int]]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return self._requests()


def is_stream(dataset: Any) -> bool:
    """Whether data can only be read from the front. Raises DataError for what is no dataset at all."""
    found, do = f"a {type(dataset).__qualname__}", "give an object that has them"
    if isinstance(dataset, type):
        found = f"the class {dataset.__qualname__}, not an object of it"
    elif isinstance(dataset, DataLoader):
        do = "give the dataset within: order, batches and workers are data.shuffle, data.global_batch and data.workers"
    elif isinstance(dataset, IterableDataset):
        return True
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return False
    elif hasattr(dataset, "__iter__"):
        return True
    raise DataError(explain("A dataset has __len__ and __getitem__, or __iter__, and gives single items.", found, do))


def _check_settings(*, global_batch: int, micro_batch: int, last: str, on_resume: str) -> None:
    """An own loop's arguments pass no schema."""
    for name, asked, known in (("last", last, ("short", "drop")), ("on_resume", on_resume, ("exact", "replay"))):
        if asked not in known:
            raise ConfigError(explain(f"data.{name}={asked!r}", f"known: {' and '.join(known)}", "choose one of them"))
    if global_batch < 1 or micro_batch < 1:
        found = f"global_batch={global_batch}, micro_batch={micro_batch}"
        raise ConfigError(explain("A batch is a number of samples.", found, "write at least 1 for both"))


def _next(fetched: Iterator[Any], name: str) -> Any:
    try:
        found = next(fetched)
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise lost_worker(error, name) from error
    if isinstance(found, DataError):
        raise found
    return found


def is_lost_worker(error: BaseException) -> bool:
    """Whether a data worker died, which torch raises from a signal handler in whatever code runs just then. Pure.

    What user code raises in a worker comes through as "Caught ... in DataLoader worker process N", and is theirs.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def lost_worker(error: BaseException, name: str = "the data") -> DataError:
    """What to tell of it; `name` is the dataset's, where that is known. Pure."""
    return DataError(
        explain(
            f"data.workers processes fetch the items of {name}.",
            str(error).split("\n")[0],
            "see what killed it (memory, a crash in user code), or set data.workers=0 to see its error here",
        )
    )


def _end_workers(fetched: Iterator[Any] | None) -> None:
    shut_down = getattr(fetched, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _as_it_is(batch: Any) -> Any:
    """A worker brings what the collate function made: a DataLoader's own rule turns arrays into tensors."""
    return batch


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches the workers too, and is the training process's to answer: it ends them when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
