"""A run that saves in the background survives SIGKILL at random moments and ends as if it had never been killed.

Two ranks are used, which continue bit-equal under ddp and fsdp (test_kill_and_resume.py says why two). Ranks are forked
from a server that has imported torch, so that a kill costs one second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import STRATEGIES
from launched import PROJECT, metrics
from torch.distributed import TCPStore

from disttrain.checkpoint import Checkpoint, list_checkpoints
from disttrain.testing.world import _CONTEXT as CONTEXT
from disttrain.testing.world import take_place

SIZE, STEPS, EVERY = 2, 120, 3
ENDS_S = 60.0
"""For the ranks that were not killed to notice and leave, on two busy cores."""

YAML = f"""
version: 1
run:       {{name: hunted, dir: runs, seed: 3, steps: {STEPS}, device: cpu, timeout_s: 60}}
model:     {{target: gpt, args: {{layers: 2, width: 32, heads: 4, kv_heads: 2, context: 16, vocab: 256, dropout: 0.1}}}}
objective: {{target: next_token}}
data:
  train:   {{target: byte_text, args: {{source: text, context: 16}}}}
  global_batch: 16
  micro_batch: 4
optim:     {{target: torch.optim.AdamW, args: {{lr: 3.0e-3, weight_decay: 0.1}}, clip_norm: 1.0}}
schedule:  {{target: cosine, args: {{warmup: 4}}}}
checkpoint: {{every: {EVERY}, background: true, keep_last: 2}}
report:    {{every: 1, progress: false, plot: false}}
"""

SLOW = """
import time
from torch.utils.data import default_collate

def collate(items):
    time.sleep(0.2)
    return default_collate(items)
"""
"""Two micro-batches a step on each rank: a step takes longer than to write what there is."""

COMPARED = ("step", "loss", "lr", "grad_norm", "samples", "tokens")


def train(rank: int, port: int, overrides: list[str]) -> None:
    """One rank, placed as by torchrun. Its output goes to a file."""
    take_place(rank, SIZE, port)
    os.dup2(os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from disttrain.run import main

    sys.exit(main(["hunted.yaml", *overrides]))


class World:
    """Two ranks that train. No process outlives the context."""

    def __init__(self, overrides: list[str]) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        make: Any = CONTEXT.Process
        self.ranks: list[BaseProcess] = [
            make(target=train, args=(rank, self.store.port, overrides)) for rank in range(SIZE)
        ]
        for rank in self.ranks:
            rank.start()

    def ends(self) -> list[int | None]:
        """Returns the exit codes, once all ranks have exited or were killed. A rank that stays is a failure."""
        deadline = time.monotonic() + ENDS_S
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
        return codes


@dataclass
class Hunt:
    """The kills so far, and the cost of each: steps that the metrics had reported and that were computed again."""

    kills: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    finished: int = 0
    overtaken: int = 0


def reported_step(run: Path) -> int:
    """The last step that metrics.jsonl reports in a complete line, 0 for none."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def ledger(run: Path, event: str) -> list[dict[str, Any]]:
    file = run / "ledger.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["event"] == event]


def hunt(run: Path, overrides: list[str], chosen: random.Random, kills: int, within_s: float = 1.0) -> Hunt:
    """Train, kill, train again. Each run that finishes is compared and removed. The last run finishes."""
    assert World(overrides).ends() == [0, 0], said()
    expected = (numbers(run), last_state(run))
    shutil.rmtree(run)
    found = Hunt()
    while found.kills < kills or run.exists():
        world = World(overrides)
        before, segments = reported_step(run), len(ledger(run, "segment"))
        if found.kills < kills:
            strike(world, run, chosen, found, segments, within_s)
        codes = world.ends()
        assert None not in codes, f"a rank did not leave within {ENDS_S} s: {codes}\n{said()}"
        began = ledger(run, "segment")[segments:]
        assert len(began) <= 1
        for segment in began:  # the cost of the previous kill
            committed = max(
                (one["step"] for one in ledger(run, "checkpoint") if one["time"] < segment["time"]), default=0
            )
            assert segment["step"] >= committed, "a checkpoint that the ledger tells of was not found"
            if before:
                found.lost.append(before - segment["step"])
        if codes == [0, 0]:
            assert (numbers(run), last_state(run)) == expected
            assert not ledger(run, "checkpoint_rejected")
            shutil.rmtree(run)
            found.finished += 1
        else:
            assert -signal.SIGKILL in codes, said()
    return found


def strike(world: World, run: Path, chosen: random.Random, found: Hunt, segments: int, within_s: float) -> None:
    """Kill one rank or both at a random moment: mostly while it trains, sometimes while it starts."""
    if chosen.random() < 0.8:
        deadline = time.monotonic() + ENDS_S
        while len(ledger(run, "segment")) == segments and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(chosen.uniform(0.0, within_s))
    who = chosen.choice([[0], [1], [0, 1]])
    alive = [rank for rank in who if world.ranks[rank].is_alive()]
    for rank in alive:
        world.ranks[rank].kill()
    if alive and len(ledger(run, "segment")) == segments:
        # A rank that waits for a missing peer does so for run.timeout_s. torchrun would end it at once.
        for rank in world.ranks:
            rank.kill()
    if alive:
        found.kills += 1
        found.victims[" and ".join(map(str, who))] += 1
    else:
        found.overtaken += 1


def said() -> str:
    return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(Path().glob("said-*")))


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in COMPARED} for line in metrics(run)]


def last_state(run: Path) -> dict[str, bytes]:
    """Every stored tensor of the run's last checkpoint, by its bytes."""
    last = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1])
    assert last.step == reported_step(run)
    return {name: last.read(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in last.tensors}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hunted.yaml").write_text(YAML)
    (tmp_path / "slow.py").write_text(SLOW)
    shutil.copy(PROJECT / "LICENSE", tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "hunted"


def judge(found: Hunt, kills: int, most: int = 2 * EVERY) -> None:
    print(
        f"\n{found.kills} kills ({dict(found.victims)}), {found.finished} runs ended bit-equal; "
        f"steps computed again: {dict(sorted(Counter(found.lost).items()))}",
        flush=True,
    )
    assert found.kills == kills
    assert found.finished >= 1
    # A save that falls due waits for the previous one. So one interval of reported steps is computed again, plus the
    # interval that was still being written at the kill, and no more.
    assert max(found.lost, default=0) <= most


@pytest.mark.parametrize(("name", "seed"), [("ddp", 1), pytest.param("fsdp", 2, marks=pytest.mark.slow)])
def test_three_kills_while_saving_in_the_background(name: str, seed: int, run: Path) -> None:
    judge(hunt(run, STRATEGIES[name], random.Random(seed), 3), 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3, 13))
def test_two_hundred_kills_while_saving_in_the_background(seed: int, run: Path) -> None:
    """Ten rounds of twenty."""
    judge(hunt(run, STRATEGIES["ddp" if seed % 2 else "fsdp"], random.Random(seed), 20), 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [13, 14])
def test_a_kill_costs_at_most_one_interval_if_a_save_takes_less_than_a_step(seed: int, run: Path) -> None:
    slow = [*STRATEGIES["ddp" if seed % 2 else "fsdp"], "data.collate.target=slow:collate", "run.steps=24"]
    judge(hunt(run, slow, random.Random(seed), 20, within_s=4.0), 20, most=EVERY)
