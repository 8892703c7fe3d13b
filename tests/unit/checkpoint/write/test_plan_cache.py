"""Later saves of the same plan: communication does not grow with the tensors, and files stay byte-equal."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_world import LAYOUTS, ThreadRanks, on_ranks, same_bits, some_tensors
from torch import Tensor

from disttrain.checkpoint import Checkpoint, PlanCache, Shard, save_checkpoint
from disttrain.errors import CheckpointError

SIZE = 3
MANY = {f"model/m/layer{number:03d}": torch.arange(12.0).view(6, 2) + number for number in range(200)}


class Counted:
    """Ranks that count the bytes of their messages."""

    def __init__(self, ranks: ThreadRanks) -> None:
        self.rank, self.size, self._ranks, self.said = ranks.rank, ranks.size, ranks, 0

    def gather(self, value: Any, /) -> list[Any] | None:
        self.said += len(pickle.dumps(value))
        return self._ranks.gather(value)

    def broadcast(self, value: Any, /) -> Any:
        return self._ranks.broadcast(value)

    def barrier(self) -> None:
        self._ranks.barrier()


def save(root: Path, step: int, memories: list[PlanCache], cut: Any, tensors: Mapping[str, Tensor]) -> list[Any]:
    """Bytes that each rank sent, or the error that it raised."""

    def act(own: ThreadRanks) -> int:
        ranks = Counted(own)
        shards: list[Shard] = cut(tensors, own.rank, SIZE)
        save_checkpoint(root, step, shards, {}, ranks, plans=memories[own.rank], chunk_bytes=4096)
        return ranks.said

    return on_ranks(SIZE, act)


def test_a_save_with_the_sharding_of_the_previous_one_sends_a_digest(tmp_path: Path) -> None:
    memories = [PlanCache() for _ in range(SIZE)]
    first, again = (save(tmp_path, step, memories, LAYOUTS["rows"], MANY) for step in (1, 2))
    fresh = save(tmp_path / "fresh", 2, [PlanCache() for _ in range(SIZE)], LAYOUTS["rows"], MANY)
    assert all(said > 200 * 20 for said in first), "200 tensors, by name"
    assert all(said < 1000 for said in again), "and none"
    assert all(said > 200 * 20 for said in fresh)
    one, other = (root / "step-00000002" for root in (tmp_path, tmp_path / "fresh"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_with_another_sharding_is_planned_again(layout: str, tmp_path: Path) -> None:
    """Another sharding, one tensor more, a tensor of another dtype, and the first sharding again: each loads as it was
    saved.
    """
    memories = [PlanCache() for _ in range(SIZE)]
    tensors = some_tensors()
    wider = {**tensors, "model/m/more": torch.arange(7.0)}
    retyped = {**wider, "model/m/more": torch.arange(7.0, dtype=torch.float64)}
    states = [("rows", tensors), (layout, tensors), (layout, wider), (layout, retyped), ("rows", tensors)]
    for step, (name, held) in enumerate(states, start=1):
        said = save(tmp_path, step, memories, LAYOUTS[name], held)
        assert all(isinstance(one, int) for one in said), said
        found = Checkpoint.open(tmp_path / f"step-{step:08d}")
        found.verify()
        assert set(found.tensors) == set(held)
        assert all(same_bits(found.read(key), value) for key, value in held.items())


def test_a_change_on_one_rank_only_is_noticed(tmp_path: Path) -> None:
    memories = [PlanCache() for _ in range(SIZE)]

    def cut(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Shard]:
        return LAYOUTS["rows"](tensors, rank, size)[: None if rank else -1]

    save(tmp_path, 1, memories, LAYOUTS["rows"], MANY)
    told = save(tmp_path, 2, memories, cut, MANY)
    assert all(isinstance(one, CheckpointError) and "layer199" in str(one) for one in told), told
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert all(isinstance(one, int) for one in save(tmp_path, 2, memories, LAYOUTS["rows"], MANY))


def test_a_save_that_failed_after_planning_can_be_tried_again(tmp_path: Path) -> None:
    memories = [PlanCache() for _ in range(SIZE)]
    save(tmp_path, 1, memories, LAYOUTS["rows"], MANY)
    told = save(tmp_path, 1, memories, LAYOUTS["rows"], MANY)
    assert all("exists already" in str(one) for one in told)
    assert all(said < 1000 for said in save(tmp_path, 2, memories, LAYOUTS["rows"], MANY))
