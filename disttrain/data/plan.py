"""Who computes what of a step: pure arithmetic over (samples, micro-batch, parts), the same on every rank.

A global batch is consecutive positions of the order, cut into micro-batches; micro-batch j belongs to part j % parts.
Parts that run out replay, so that all of them bring equally many and collectives stay aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from disttrain.errors import DataError, explain


@dataclass(frozen=True)
class Slot:
    """One micro-batch of one part: `start` and `count` within the global batch, `real` unless it is a replay."""

    index: int
    start: int
    count: int
    real: bool


@dataclass(frozen=True)
class MicroBatch:
    """A collated batch of `samples` items; `index` is its place in the global batch; not `real`, it is a replay."""

    batch: Any
    index: int
    real: bool
    samples: int


class StepBatch(list[MicroBatch]):
    """A step's micro-batches of one part. `samples` counts all parts'; `position` is where the data stand after it."""

    def __init__(
        self, micro_batches: Sequence[MicroBatch], *, epoch: int, samples: int, position: dict[str, Any]
    ) -> None:
        super().__init__(micro_batches)
        self.epoch = epoch
        self.samples = samples
        self.position = position


def plan_step(samples: int, micro_batch: int, part: tuple[int, int]) -> list[Slot]:
    """This part's slots of a global batch of `samples`. A part without any replays the step's first. Pure."""
    index, parts = part
    total = -(-samples // micro_batch)
    own = [
        Slot(j, j * micro_batch, min(micro_batch, samples - j * micro_batch), True) for j in range(index, total, parts)
    ]
    missing = -(-total // parts) - len(own)
    if not missing:
        return own
    replay = replace(own[-1], real=False) if own else Slot(0, 0, min(micro_batch, samples), False)
    return own + [replay] * missing


def even_share(samples: int, part: tuple[int, int]) -> int:
    """How many of `samples` a part takes where each reads data of its own: shares differ by one at most. Pure."""
    index, parts = part
    return -(-(samples - index) // parts)


def plan_share(samples: int, micro_batch: int, part: tuple[int, int]) -> list[Slot]:
    """Like `plan_step`, over this part's even share of `samples`, which its slots count from 0. Pure.

    What a part reads then depends on no micro-batch. `samples` is at least the number of parts.
    """
    index, parts = part
    assert samples >= parts, f"{samples} samples over {parts} parts"
    share = even_share(samples, part)
    own = [
        Slot(k * parts + index, start, min(micro_batch, share - start), True)
        for k, start in enumerate(range(0, share, micro_batch))
    ]
    most = -(-even_share(samples, (0, parts)) // micro_batch)
    return own + [replace(own[-1], real=False)] * (most - len(own))


def distinct(slots: Sequence[Slot]) -> list[Slot]:
    """One slot for each batch to fetch: a replay of an own one is the same batch. Pure."""
    return [next(group) for _, group in itertools.groupby(slots, key=lambda slot: slot.index)]


def align_batches(batches: Sequence[Any], counts: Sequence[int], part: int) -> list[MicroBatch]:
    """A step from batches that a script made itself; `counts` is how many each part brings. Pure.

    Raises DataError on every part alike where one has none: it would have nothing to replay.
    """
    if min(counts) < 1:
        raise DataError(
            explain(
                "Every data-parallel rank brings at least one batch to a step.",
                f"{', '.join(map(str, counts))} batches, by rank",
                "spread the batches more evenly, or skip this step on all ranks",
            )
        )
    own = [MicroBatch(batch, k * len(counts) + part, True, 0) for k, batch in enumerate(batches)]
    replay = MicroBatch(own[-1].batch, own[-1].index, False, 0)
    return own + [replay] * (max(counts) - len(own))
