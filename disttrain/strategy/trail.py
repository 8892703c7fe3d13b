"""The way of one rank through the parts of a model that ranks must go through together, because collectives pair them.

Where ranks go other ways (experts that only some call) such collectives pair one part with another, and raise nothing
if the shapes agree. A trail is a digest of the way: equal on all ranks, or the step is refused before it is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from disttrain.errors import explain


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
