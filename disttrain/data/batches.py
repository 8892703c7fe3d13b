"""Yields a part's micro-batches step by step, from any position, with the same samples at any world size.

The sequence of samples depends on (seed, epoch, position) alone. The mesh, the micro-batch size and the number of
workers only decide which process fetches which samples. A step never crosses the end of an epoch: the last step of an
epoch is short or dropped. Data that cannot fill a step is rejected.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from disttrain.data.fetch import Collate, Fetcher
from disttrain.data.sample_order import Order
from disttrain.data.step_plan import MicroBatch, Slot, StepBatch, distinct, plan_step
from disttrain.data.streams import Stream
from disttrain.errors import ConfigError, DataError, explain
from disttrain.logs import package_logger
from disttrain.torch_internals.modules import end_workers


class Batches:
    """An endless sequence of the steps of one part.

    Local, except for `agree`.

    Args:
        dataset: a map-style or iterable dataset of single items.
        seed: the seed of the order of samples and of each item's random numbers.
        global_batch: samples per step over all parts.
        micro_batch: samples per micro-batch of a part.
        part: (index, count) of the data-parallel coordinate.
        shuffle: whether to shuffle the samples of a map-style dataset.
        last: `short` keeps an epoch's last partial step, and `drop` drops it.
        workers: the number of worker processes for a map-style dataset.
        prefetch: batches that each worker fetches in advance.
        collate: a function from a list of items to a batch, instead of torch's default.
        on_resume: for streams that have no exact position, `exact` rejects the resume and `replay` reads again.
        agree: returns the minimum of a value over all parts. Streams cut by `shard` call it once per step. They end an
            epoch with the last step that every part can fill.

    Raises:
        ConfigError: a setting has an unknown or impossible value.
        DataError: `dataset` is not a dataset, is empty or has too few samples for a step.
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
                    "data.workers=%d: iterable data is read in the training process, without workers", workers
                )
            self._stream = Stream(
                dataset, seed=seed, part=part, collate=self._fetcher.collate, exact=on_resume == "exact"
            )
            self._agree = agree
            if self._stream.sharded and not self._drop:
                package_logger("data").warning(
                    "data.last=short: a dataset cut by shard ends with its last complete step instead"
                )
            return
        size = len(dataset)
        if size < global_batch:
            raise DataError(
                explain(
                    f"Cannot fill a step of data.global_batch={global_batch} samples.",
                    f"{self._name} has {size}" if size else f"{self._name} is empty",
                    "lower data.global_batch or provide more data" if size else "provide enough data for one step",
                )
            )
        self._order = Order(size, seed, shuffle=shuffle)

    @property
    def steps_per_epoch(self) -> int | None:
        """The number of steps in an epoch, or None for an iterable dataset."""
        if self._stream is not None:
            return None
        full, rest = divmod(self._order.size, self._global_batch)
        return full + (1 if rest and not self._drop else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded step as JSON values.

        The position does not depend on the micro-batch size or the number of workers. It depends on the number of
        parts only for a dataset cut by `shard`.
        """
        state: dict[str, Any] = {"epoch": self._epoch, "position": self._position}
        return state if self._stream is None else state | self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state` at the next `iter`."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        if self._stream is not None:
            self._stream.load_state_dict(state)

    def __iter__(self) -> Iterator[StepBatch]:
        return self._streamed() if self._stream is not None else self._indexed()

    def close(self) -> None:
        """Stop the worker processes."""
        end_workers(self._loading)

    # ------------------------------------------------------------------ map-style data

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """Yield (epoch, first position, samples) of each step from the current position."""
        epoch, position, size = self._epoch, self._position, self._order.size
        while True:
            samples = min(self._global_batch, size - position)
            if samples <= 0 or (self._drop and samples < self._global_batch):
                epoch, position = epoch + 1, 0
                continue
            yield epoch, position, samples
            position += samples

    def _requests(self) -> Iterator[tuple[int, int, int]]:
        """Yield (epoch, first position, count) of each batch to fetch. Replays of this part's batches are left out."""
        for epoch, start, samples in self._steps():
            for slot in _planned(samples, self._micro_batch, self._part)[1]:
                yield epoch, start + slot.start, slot.count

    def _start_workers(self, source: _BatchesByRequest) -> Iterator[Any] | None:
        """Start the workers and return their batches in the order of `_requests`, or None without workers."""
        if self._workers == 0:
            return None
        loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_RequestSampler(self._requests),
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # starting workers would otherwise draw from the user's default generator
        )
        self._loading = iter(loader)
        return self._loading

    def _indexed(self) -> Iterator[StepBatch]:
        source = _BatchesByRequest(self._order, self._fetcher)
        loaded = self._start_workers(source)
        try:
            for epoch, start, samples in self._steps():
                slots, fetch = _planned(samples, self._micro_batch, self._part)
                batches = {}
                for slot in fetch:
                    request = epoch, start + slot.start, slot.count
                    batches[slot.index] = source[request] if loaded is None else _next_batch(loaded, self._name)
                micro_batches = [MicroBatch(batches[slot.index], slot.index, slot.real, slot.count) for slot in slots]
                self._epoch, self._position = epoch, start + samples
                yield StepBatch(micro_batches, epoch=epoch, samples=samples, position=self.state_dict())
        finally:
            end_workers(loaded)  # the garbage collector would take five seconds per worker

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
                        f"Cannot fill a step of data.global_batch={self._global_batch} samples.",
                        f"{self._name} ended before its first step in epoch {self._epoch}",
                        "provide more data, lower data.global_batch, or set data.last=short; __iter__ must start from "
                        "the beginning in every epoch",
                    )
                )
            self._epoch, self._position = self._epoch + 1, 0
            self._stream.rewind()


@lru_cache(maxsize=16)
def _planned(samples: int, micro_batch: int, part: tuple[int, int]) -> tuple[list[Slot], list[Slot]]:
    """Return a step's slots and the slots to fetch. Both are the same for all steps except an epoch's last."""
    slots = plan_step(samples, micro_batch, part)
    return slots, distinct(slots)


class _BatchesByRequest:
    """The dataset that workers read: it returns a batch for (epoch, first position, count)."""

    def __init__(self, order: Order, fetcher: Fetcher) -> None:
        self._order, self._fetcher = order, fetcher

    def __getitem__(self, request: tuple[int, int, int]) -> Any:
        epoch, start, count = request
        try:
            return self._fetcher.fetch(epoch, self._order.indices(epoch, start, count))
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error  # a raised error would reach the user with the worker's traceback as its message


class _RequestSampler:
    """A sampler that yields the requests from the current position at each `iter`."""

    def __init__(self, requests: Callable[[], Iterator[tuple[int, int, int]]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return self._requests()


def is_stream(dataset: Any) -> bool:
    """Return whether `dataset` can only be read from the front. Raises DataError if it is not a dataset."""
    problem, fix = f"a {type(dataset).__qualname__}", "provide a dataset with these methods"
    if isinstance(dataset, type):
        problem, fix = f"the class {dataset.__qualname__}, not an instance of it", "provide an instance"
    elif isinstance(dataset, DataLoader):
        fix = (
            "provide the DataLoader's dataset; data.shuffle, data.global_batch and data.workers set the order, the "
            "batches and the workers"
        )
    elif isinstance(dataset, IterableDataset):
        return True
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return False
    elif hasattr(dataset, "__iter__"):
        return True
    raise DataError(
        explain("A dataset needs __len__ and __getitem__, or __iter__, and returns single items.", problem, fix)
    )


def _check_settings(*, global_batch: int, micro_batch: int, last: str, on_resume: str) -> None:
    """Check the arguments of a custom training loop, which no config schema has validated."""
    for name, value, known in (("last", last, ("short", "drop")), ("on_resume", on_resume, ("exact", "replay"))):
        if value not in known:
            problem = f"{value!r} is neither {' nor '.join(known)}"
            raise ConfigError(
                explain(f"The value of data.{name} is unknown.", problem, f"set it to {' or '.join(known)}")
            )
    if global_batch < 1 or micro_batch < 1:
        problem = f"global_batch={global_batch}, micro_batch={micro_batch}"
        raise ConfigError(explain("A batch needs at least one sample.", problem, "set both to at least 1"))


def _next_batch(fetched: Iterator[Any], name: str) -> Any:
    try:
        batch = next(fetched)
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise lost_worker(error, name) from error
    if isinstance(batch, DataError):
        raise batch
    return batch


def is_lost_worker(error: BaseException) -> bool:
    """Return whether `error` says that a data worker died. Pure.

    torch raises this error from a signal handler, in whatever code runs at the time. An error of user code in a worker
    has another message, "Caught ... in DataLoader worker process N", and is not counted here.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def lost_worker(error: BaseException, name: str = "the data") -> DataError:
    """Return the DataError for a data worker that died. `name` is the name of the dataset, if known. Pure."""
    return DataError(
        explain(
            f"A worker process (data.workers) that fetched items of {name} died.",
            str(error).split("\n")[0],
            "find out what killed it (memory, a crash in user code), or set data.workers=0 to see its error here",
        )
    )


def _unchanged(batch: Any) -> Any:
    """Return a collated batch as it is. The default of DataLoader would convert arrays to tensors."""
    return batch


def _ignore_interrupts(_: int) -> None:
    """Ignore Ctrl-C in a worker. The training process handles it and stops the workers when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
