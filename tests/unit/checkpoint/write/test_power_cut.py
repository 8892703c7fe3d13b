"""A power cut after any operation of a writer: the loader finds the previous or the new checkpoint, bit-equal."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint_world import LAYOUTS, on_ranks, same_bits
from power_cut import ModelDisk, Operation, Recorder, count_states, every_state, some_state, write_tree

from disttrain.checkpoint import (
    Checkpoint,
    SoleRank,
    newest_intact,
    prune,
    remove_stale_staging,
    save_checkpoint,
    set_aside,
)
from disttrain.errors import CheckpointError

RANKS = 2
RETURNED = "returned"


def state_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model/m/w": torch.randn(7, 5, generator=generator),
        "model/m/b": torch.randn(3, generator=generator),
        "optim/m/w:exp_avg": torch.randn(7, 5, generator=generator),
        "optim/m/w:step": torch.tensor(float(step)),
    }


def save(root: Path, step: int, recorder: Recorder | None = None) -> None:
    def act(ranks):
        shards = LAYOUTS["rows"](state_of(step), ranks.rank, RANKS)
        disk = recorder.disk() if recorder else None
        return save_checkpoint(root, step, shards, {"step": step}, ranks, disk=disk, chunk_bytes=4096)

    assert on_ranks(RANKS, act) == [root / f"step-{step:08d}"] * RANKS


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Operation]]:
    """Two ranks save three times into a new run folder. Older checkpoints are removed after the new one exists."""
    run = tmp_path_factory.mktemp("run")
    root, recorder = run / "checkpoints", Recorder()
    for step in (100, 200, 300):
        save(root, step, recorder)
        recorder.mark(RETURNED)
        prune(root, 1, disk=recorder.disk())
    silent = {"make_parent", RETURNED}
    assert recorder.announced == sum(one.name not in silent for one in recorder.operations)
    return run, recorder.operations


@dataclass
class Tally:
    """Crash points, disk states (checked and possible), and what was lost or mixed, in words."""

    points: int
    looked_at: int
    possible: int
    faults: list[str]


def replay(run: Path, operations: Sequence[Operation], place: Path, limit: int) -> Tally:
    """Cut the power after each number of operations. Checks all states of the disk, or `limit` random ones."""
    model, chosen = ModelDisk(run), random.Random(4)
    tally, safe, begun = Tally(0, 0, 0, []), 0, 0
    for number in range(len(operations) + 1):
        if number:
            operation = operations[number - 1]
            if operation.name == RETURNED:
                safe = begun
                continue
            if operation.name == "make_folder":
                begun += 100
            model.apply(operation)
        count = count_states(model.top)
        states = every_state(model.top) if count <= limit else (some_state(model.top, chosen) for _ in range(limit))
        tally.points, tally.possible = tally.points + 1, tally.possible + count
        for state in states:
            tally.looked_at += 1
            shutil.rmtree(place, ignore_errors=True)
            write_tree(state, place)
            fault = fault_of(place / "checkpoints", safe, begun, go_on=tally.looked_at % 7 == 0)
            if fault:
                done = operations[number - 1] if number else None
                tally.faults.append(f"after operation {number} ({done and done.name}), {shape(state)}: {fault}")
    return tally


def fault_of(root: Path, safe: int, begun: int, *, go_on: bool) -> str | None:
    """Returns what is wrong with the state that a resuming run loads.

    `safe` is the newest step whose save had returned, 0 for none.
    """
    found, rejected = newest_intact(root, SoleRank())
    if found is None:
        return f"nothing found, {safe} was saved" if safe or rejected else None
    if not max(safe, begun - 100) <= found.step <= begun:
        return f"{found.step} found, {safe} was saved"
    expected = state_of(found.step)
    if found.tensors.keys() != expected.keys() or found.document != {"step": found.step}:
        return f"{found.step} holds something else"
    mixed = [name for name in expected if not same_bits(found.read(name), expected[name])]
    if mixed:
        return f"{found.step} holds another {', '.join(mixed)}"
    if rejected:
        return f"{found.step} found, but a newer one half there: {rejected}"
    half = [path.name for path in root.glob("step-*") if not is_complete(path)]
    if half:
        return f"{found.step} found, but {half} are half there"
    if go_on:  # a run does this next: clean up, and save what the cut removed
        remove_stale_staging(root)
        for path, _ in rejected:
            set_aside(path)
        save(root, found.step + 100)
        prune(root, 1)
        again, _ = newest_intact(root, SoleRank())
        if again is None or again.step != found.step + 100:
            return f"after {found.step} nothing could be saved"
    return None


def is_complete(path: Path) -> bool:
    try:
        Checkpoint.open(path, verify=False)
    except CheckpointError:
        return False
    return True


def shape(tree: object) -> object:
    return {name: shape(child) for name, child in tree.items()} if isinstance(tree, dict) else len(tree)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_every_state_after_a_power_cut_has_the_previous_or_the_new_checkpoint(
    recorded, tmp_path: Path, limit: int
) -> None:
    """CI checks at most eight states of each crash point, chosen with a fixed seed.

    The slow test checks every state.
    """
    run, operations = recorded
    tally = replay(run, operations, tmp_path / "cut", limit)
    print(f"\n{tally.points} crash points, {tally.looked_at} of {tally.possible} disk states looked at")
    assert tally.points > 50
    assert tally.possible > 1000
    assert tally.looked_at == tally.possible if limit == 500 else tally.looked_at > 200
    assert not tally.faults, f"{len(tally.faults)} states:\n" + "\n".join(tally.faults[:10])


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_a_writer_that_does_not_sync_is_detected(recorded, tmp_path: Path, forgotten: str) -> None:
    run, operations = recorded
    careless = [one for one in operations if one.name != forgotten]
    assert replay(run, careless, tmp_path / "cut", limit=10).faults
