"""Copies the shards that a rank writes into host memory, so that training continues while they are written.

The memory has the size of this rank's file. It is allocated by the first copy and reused by all later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box
from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.write.write_plan import choose_shards


class ShardCopies:
    """Copies of shards, valid until the next `copy`. Local."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Box, torch.dtype], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of host memory in use."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def copy(self, shards: Sequence[Shard]) -> list[Shard]:
        """Copy those of the shards that this rank writes. `save_checkpoint` accepts the result.

        The copies are complete when this returns, whatever happens to the originals afterwards.
        """
        mine = choose_shards(shards)
        before, self._kept = self._kept, {}
        staged = []
        for shard in mine:
            key = shard.name, shard.box, shard.tensor.dtype
            into = before.pop(key, None)
            if into is None:
                into = torch.empty(shard.box.sizes, dtype=shard.tensor.dtype, pin_memory=shard.tensor.is_cuda)
            into.copy_(shard.tensor.detach(), non_blocking=True)
            self._kept[key] = into
            staged.append(replace(shard, tensor=into, replica=(0, 1)))
        if any(shard.tensor.is_cuda for shard in mine):
            torch.cuda.synchronize()
        chosen = {(shard.name, shard.box) for shard in mine}
        # A tensor without elements has no writer. Rank 0 names it.
        named = [s for s in shards if not torch.Size(s.shape).numel() and (s.name, s.box) not in chosen]
        return staged + [replace(shard, replica=(0, 1)) for shard in named]
