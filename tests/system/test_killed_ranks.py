"""Any rank killed before any of its operations: the previous or the new checkpoint is intact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from checkpoint_world import LAYOUTS, on_ranks, same_bits
from killed_ranks import state_of

from disttrain.checkpoint import SoleRank, list_checkpoints, newest_intact, remove_stale_staging, save_checkpoint

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_killed_before_each_of_its_operations(size: int, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed_ranks.py"), str(tmp_path), str(size)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)
    kills = [trial for trial in trials if trial[2] is not None]
    # a rank survives only the trial in which it would die after its last operation
    assert [victim for victim, _, killed in trials if killed is None] == list(range(size))
    found = Counter(recovered(tmp_path / f"{victim}-{at}" / "checkpoints", size) for victim, at, _ in trials)
    print(f"\n{size} rank(s): {len(kills)} of {len(kills)} kills recovered, to {dict(found)}")
    assert set(found) == {100, 200}
    mine = {rank: {killed for victim, _, killed in kills if victim == rank} for rank in range(size)}
    assert mine[0] == {"make_folder", "create", "write", "sync", "sync_folder", "rename", "remove_tree"}
    assert all(mine[rank] == {"create", "write", "sync", "sync_folder"} for rank in range(1, size))
    # before the rename the previous checkpoint is the only one, after it the new one
    for victim, at, killed in kills:
        before = [what for who, number, what in kills if who == victim and number <= at]
        old = "rename" not in before[:-1]
        assert recovered(tmp_path / f"{victim}-{at}" / "checkpoints", size) == (100 if old else 200), killed


def recovered(root: Path, size: int) -> int:
    """The newest intact step, after a check of every bit and a second save of what may have been lost."""
    found, rejected = newest_intact(root, SoleRank())
    assert found is not None
    assert rejected == []
    expected = state_of(found.step)
    assert found.tensors.keys() == expected.keys()
    assert found.document == {"step": found.step}
    assert all(same_bits(found.read(name), tensor) for name, tensor in expected.items())
    remove_stale_staging(root)
    assert sorted(root.iterdir()) == list_checkpoints(root)
    if not (root.parent / "step-00000300").exists():
        act = lambda ranks: save_checkpoint(  # noqa: E731
            root, 300, LAYOUTS["flat"](state_of(300), ranks.rank, size), {"step": 300}, ranks
        )
        assert on_ranks(size, act) == [root / "step-00000300"] * size
        (root / "step-00000300").rename(root.parent / "step-00000300")
    return found.step
