"""One pass over an evaluation set, each sample once over all parts, every part the same number of rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from disttrain.data.batches import is_stream
from disttrain.data.fetch import Collate, Fetcher
from disttrain.data.plan import MicroBatch, plan_step
from disttrain.data.streams import Stream
from disttrain.errors import DataError, explain


class EvaluationBatches:
    """This part's micro-batches in the data's own order. Raises DataError for an empty set."""

    def __init__(
        self, dataset: Any, *, seed: int, micro_batch: int, part: tuple[int, int], collate: Collate | None = None
    ) -> None:
        self._dataset, self._seed, self._micro_batch, self._part = dataset, seed, micro_batch, part
        self._fetcher = Fetcher(dataset, seed=seed, collate=collate)

    def __iter__(self) -> Iterator[MicroBatch]:
        found = self._streamed() if is_stream(self._dataset) else self._indexed()
        empty = True
        for micro in found:
            empty = False
            yield micro
        if empty:
            raise DataError(
                explain(
                    "An evaluation set has samples.", f"{type(self._dataset).__qualname__} has none", "give it some"
                )
            )

    def _indexed(self) -> Iterator[MicroBatch]:
        size = len(self._dataset)
        for slot in plan_step(size, self._micro_batch, self._part) if size else []:
            # Epoch -1: an evaluation's draws are its own, and the same every time.
            batch = self._fetcher.fetch(-1, range(slot.start, slot.start + slot.count))
            yield MicroBatch(batch, slot.index, slot.real, slot.count)

    def _streamed(self) -> Iterator[MicroBatch]:
        """Every part reads all and keeps its own: an evaluation must count each sample once at any world size."""
        alone = Stream(self._dataset, seed=self._seed, part=(0, 1), collate=self._fetcher.collate, exact=False)
        parts = self._part[1]
        rounds = alone.steps(-1, 0, self._micro_batch * parts, self._micro_batch, drop=False, agree=lambda value: value)
        for _, micro_batches in rounds:
            mine = micro_batches[self._part[0]] if self._part[0] < len(micro_batches) else None
            if mine is not None:
                yield mine
            else:
                first = micro_batches[0]
                yield MicroBatch(first.batch, first.index, False, first.samples)
