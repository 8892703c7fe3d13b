"""Yields one pass over an evaluation set: each sample once over all parts, and equally many rounds for each part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from disttrain.data.batches import is_stream
from disttrain.data.fetch import Collate, Fetcher
from disttrain.data.step_plan import MicroBatch, plan_step
from disttrain.data.streams import Stream
from disttrain.errors import DataError, explain


class EvaluationBatches:
    """The micro-batches of one part, in the order of the dataset. Local. Raises DataError for an empty set."""

    def __init__(
        self, dataset: Any, *, seed: int, micro_batch: int, part: tuple[int, int], collate: Collate | None = None
    ) -> None:
        self._dataset, self._seed, self._micro_batch, self._part = dataset, seed, micro_batch, part
        self._fetcher = Fetcher(dataset, seed=seed, collate=collate)

    def __iter__(self) -> Iterator[MicroBatch]:
        empty = True
        for micro in self._streamed() if is_stream(self._dataset) else self._indexed():
            empty = False
            yield micro
        if empty:
            raise DataError(
                explain(
                    "Cannot evaluate on an empty set.",
                    f"{type(self._dataset).__qualname__} has no samples",
                    "provide at least one sample, or remove the set from eval.sets",
                )
            )

    def _indexed(self) -> Iterator[MicroBatch]:
        size = len(self._dataset)
        for slot in plan_step(size, self._micro_batch, self._part) if size else []:
            # Epoch -1 gives evaluations their own random numbers, the same in each evaluation.
            batch = self._fetcher.fetch(-1, np.arange(slot.start, slot.start + slot.count))
            yield MicroBatch(batch, slot.index, slot.real, slot.count)

    def _streamed(self) -> Iterator[MicroBatch]:
        """Read the complete stream on every part, so that each sample counts once at any world size."""
        stream = Stream(
            self._dataset, seed=self._seed, part=self._part, collate=self._fetcher.collate, exact=False, shards=False
        )
        size, parts = self._micro_batch, self._part[1]
        rounds = stream.steps(-1, 0, size * parts, size, drop=False, agree=lambda value: value)
        for number, (_, micro_batches) in enumerate(rounds):
            for micro in micro_batches:
                yield replace(micro, index=number * parts + micro.index)
