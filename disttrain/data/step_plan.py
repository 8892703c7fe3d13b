"""Plans which part computes which micro-batches of a step, with the same arithmetic on every rank.

A global batch consists of consecutive positions of the order, cut into micro-batches. Micro-batch j belongs to part
j % parts. A part that has fewer micro-batches than others replays its last one, so that all parts have equally many
and collectives stay aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from disttrain.errors import DataError, explain


@dataclass(frozen=True)
class Slot:
    """A planned micro-batch of one part: `count` samples from `start` in the global batch.

    `index` is the position of the micro-batch in the global batch. `real` is false for a replay.
    """

    index: int
    start: int
    count: int
    real: bool


@dataclass(frozen=True)
class MicroBatch:
    """A collated batch of `samples` items.

    `index` is the position of the micro-batch in the global batch. `real` is false for a replay, whose results do not
    count.
    """

    batch: Any
    index: int
    real: bool
    samples: int


class StepBatch(list[MicroBatch]):
    """The micro-batches of one part in one step.

    `samples` counts the samples of all parts. `position` is the data position after the step, as in
    `Batches.state_dict`.
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatch], *, epoch: int, samples: int, position: dict[str, Any]
    ) -> None:
        super().__init__(micro_batches)
        self.epoch = epoch
        self.samples = samples
        self.position = position


def plan_step(samples: int, micro_batch: int, part: tuple[int, int]) -> list[Slot]:
    """Return this part's slots of a global batch of `samples`. Pure.

    A part without micro-batches replays the first micro-batch of the step.
    """
    index, parts = part
    total = -(-samples // micro_batch)
    slots = [
        Slot(j, j * micro_batch, min(micro_batch, samples - j * micro_batch), True) for j in range(index, total, parts)
    ]
    missing = -(-total // parts) - len(slots)
    if not missing:
        return slots
    replay = replace(slots[-1], real=False) if slots else Slot(0, 0, min(micro_batch, samples), False)
    return slots + [replay] * missing


def even_share(samples: int, part: tuple[int, int]) -> int:
    """Return a part's number of `samples` if each part reads different data. Shares differ by at most one. Pure."""
    index, parts = part
    return -(-(samples - index) // parts)


def plan_share(samples: int, micro_batch: int, part: tuple[int, int]) -> list[Slot]:
    """Return this part's slots for its even share of `samples`. The slots start at 0 in the share. Pure.

    The samples that a part reads do not depend on the micro-batch size. `samples` is at least the number of parts.
    """
    index, parts = part
    assert samples >= parts, f"{samples} samples over {parts} parts"
    share = even_share(samples, part)
    slots = [
        Slot(k * parts + index, start, min(micro_batch, share - start), True)
        for k, start in enumerate(range(0, share, micro_batch))
    ]
    most = -(-even_share(samples, (0, parts)) // micro_batch)
    return slots + [replace(slots[-1], real=False)] * (most - len(slots))


def distinct(slots: Sequence[Slot]) -> list[Slot]:
    """Return one slot for each batch to fetch. A replay of this part's last micro-batch is the same batch. Pure."""
    return [next(group) for _, group in itertools.groupby(slots, key=lambda slot: slot.index)]


def align_batches(batches: Sequence[Any], counts: Sequence[int], part: int) -> list[MicroBatch]:
    """Return the micro-batches of a step from batches that a script made. Pure.

    `counts` is the number of batches of each part. Raises DataError on every part if a part has none, because that
    part has no batch to replay.
    """
    if min(counts) < 1:
        raise DataError(
            explain(
                "Every data-parallel rank needs at least one batch in a step.",
                f"{', '.join(map(str, counts))} batches on these ranks, in order of rank",
                "distribute the batches more evenly, or skip this step on all ranks",
            )
        )
    micro_batches = [MicroBatch(batch, k * len(counts) + part, True, 0) for k, batch in enumerate(batches)]
    replay = replace(micro_batches[-1], real=False)
    return micro_batches + [replay] * (max(counts) - len(micro_batches))
