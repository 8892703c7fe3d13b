"""The way of one rank through the parts of a model that ranks must go through together, because collectives pair them.

Where ranks go other ways (experts that only some call) such collectives pair one part with another, and raise nothing
if the shapes agree. A trail is a digest of the way: equal on all ranks, or the step is refused before it is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from disttrain.errors import TrainingError, explain


class Trail:
    """Names in their order since `begin`, as a 32-bit digest, and which they were. Local."""

    def __init__(self) -> None:
        self.digest = 0
        self.seen: set[str] = set()

    def begin(self) -> None:
        """Forget the way so far."""
        self.digest = 0
        self.seen.clear()

    def note(self, name: str) -> None:
        """This rank goes through `name` now."""
        self.digest = zlib.crc32(name.encode(), self.digest)
        self.seen.add(name)


def agree_on_way(digest: int, names: Sequence[str]) -> None:
    """Collective, one small all-reduce. Raises TrainingError on every rank where digests differ, with their names."""
    ends = torch.tensor([digest, -digest])  # on the host: the device is not waited for
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends[0] == -ends[1]:
        return
    everyone: list[tuple[int, Sequence[str]]] = [(0, [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (digest, names))
    rank = next(rank for rank, (other, _) in enumerate(everyone) if other != everyone[0][0])
    raise TrainingError(other_trails(everyone[0][1], rank, everyone[rank][1]))


def other_trails(first: Sequence[str], rank: int, other: Sequence[str]) -> str:
    """The message for two ranks that went other ways. Pure."""
    only = [", ".join(sorted(set(a) - set(b))[:5]) for a, b in ((first, other), (other, first))]
    found = f"rank 0 alone {only[0] or 'nothing'}, rank {rank} alone {only[1] or 'nothing'}"
    if not any(only):
        found = f"rank 0 and rank {rank} the same, in another order or number"
    return explain(
        "Every rank is to go through the same parts of the model in a step: their collectives are paired by order.",
        found,
        "use strategy ddp, or fsdp with strategy.fsdp.blocks of larger blocks that every rank calls, or [] for none",
    )
