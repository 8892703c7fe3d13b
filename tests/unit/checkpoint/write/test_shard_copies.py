"""The copy for a background save: exactly what this rank writes, complete on return, in the same memory next time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_world import LAYOUTS, ThreadRanks, on_ranks, same_bits, some_tensors

from disttrain.checkpoint import Checkpoint, ShardCopies, save_checkpoint


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("size", [1, 3])
def test_a_save_of_the_copy_equals_a_save_at_the_time_of_the_copy(tmp_path: Path, layout: str, size: int) -> None:
    tensors = some_tensors()

    def save(ranks: ThreadRanks) -> tuple[int, int]:
        shards = LAYOUTS[layout](tensors, ranks.rank, ranks.size)
        save_checkpoint(tmp_path, 1, shards, {}, ranks)
        buffer = ShardCopies()
        staged = buffer.copy(shards)
        for shard in shards:
            shard.tensor.copy_(torch.zeros(shard.tensor.shape))
        save_checkpoint(tmp_path, 2, staged, {}, ranks)
        places = {(shard.name, shard.box): shard.tensor.data_ptr() for shard in staged if shard.box.numel}
        again = {(shard.name, shard.box): shard.tensor.data_ptr() for shard in buffer.copy(shards) if shard.box.numel}
        assert again == places, "the memory is used again"
        return buffer.nbytes, sum(tensor.nbytes for tensor in tensors.values())

    found = on_ranks(size, save)
    assert not [one for one in found if isinstance(one, Exception)]
    assert sum(held for held, _ in found) == found[0][1], "all ranks together hold one copy"
    first, second = (Checkpoint.open(tmp_path / f"step-0000000{step}") for step in (1, 2))
    assert set(first.tensors) == set(second.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(second.read(name), tensor)
        assert first.tensors[name].shape == second.tensors[name].shape
