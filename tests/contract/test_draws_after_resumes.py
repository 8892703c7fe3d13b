"""Kills and resumes within an epoch at other world sizes change no data, augmentation, dropout or other random number.

The custom loop has every kind of randomness: a shuffled dataset that draws from torch, numpy and Python for every item,
dropout, and random numbers drawn in the loop.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from contract.engine_runs import QUIET, STRATEGIES
from contract.test_user_models import user_module
from torch import Tensor, nn
from world import WorldError, run_world

import disttrain

SAMPLES, BATCH, MICRO, STEPS, EVERY = 60, 6, 2, 13, 3
"""Ten steps are an epoch: both kills fall into the first, and the run ends in the second."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class ScriptGenerator:
    """A generator that belongs to the script, different on each rank."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(100 + rank)

    def draw(self) -> float:
        return torch.rand((), generator=self.generator).item()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["state"])


def draws() -> list[float]:
    return [torch.rand(()).item(), float(np.random.rand()), random.random(), float(np.random.randn()), random.gauss()]


def prepared(engine: Any) -> None:
    make_adam = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    engine.prepare("model", Net, make_adam)


def config(folder: Path) -> dict[str, Any]:
    return {
        "run": {"name": "own", "dir": str(folder), "seed": 7, "steps": STEPS},
        "checkpoint": {"every": EVERY, "keep_last": 1},
    }


def seen(step: Any, size: int) -> list[float]:
    """The labels of the global batch in order. They are the indices of the samples."""
    mine = [(micro.index, micro.batch[1].flatten().tolist()) for micro in step if micro.real]
    every: list[Any] = [None] * size
    torch.distributed.all_gather_object(every, mine)
    return [label for _, labels in sorted(pair for own in every for pair in own) for label in labels]


def everywhere(folder: Path, overrides: list[str], kill: tuple[int, int] | None) -> None:
    """Rank 0 writes one line per step with what no mesh may change. `kill` is (rank, step during which it dies)."""
    user = user_module()
    with disttrain.Engine(config(folder), [*QUIET, *overrides]) as engine:
        prepared(engine)
        for step in engine.batches(user.Augmented(SAMPLES), global_batch=BATCH, micro_batch=MICRO):
            if kill == (engine.rank, engine.progress.steps + 1):
                os.kill(os.getpid(), signal.SIGKILL)
            drawn = [draws()]
            torch.distributed.broadcast_object_list(drawn, src=0)
            scale = 0.5 + sum(drawn[0][:3])
            order = seen(step, engine.world_size)

            def objective(model: Any, batch: Any, scale: float = scale) -> tuple[Tensor, int]:
                return scale * F.mse_loss(model(batch[0] / SAMPLES), batch[1] / SAMPLES, reduction="sum"), len(batch[0])

            loss = engine.accumulate("model", step, objective).loss
            engine.step("model")
            engine.log()
            if engine.rank == 0:
                line = {"step": engine.progress.steps, "loss": loss, "order": order, "drawn": drawn[0]}
                with (folder / "lines").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if engine.should_stop():
                break


def lines(folder: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step, because a resumed run computes some steps again."""
    return {line["step"]: line for line in map(json.loads, (folder / "lines").read_text().splitlines())}


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[int, dict[str, Any]]:
    (tmp_path / "uninterrupted").mkdir()
    run_world(2, everywhere, tmp_path / "uninterrupted", STRATEGIES["ddp"], None)
    return lines(tmp_path / "uninterrupted")


def test_augmentation_dropout_and_draws_continue_at_other_world_sizes(uninterrupted: Any, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for size, name, kill in [(2, "ddp", (1, 5)), (3, "fsdp", (2, 8)), (1, "none", None)]:
        if kill is None:
            run_world(size, everywhere, cut, STRATEGIES[name], kill)
        else:
            with pytest.raises(WorldError, match="no result from rank"):
                run_world(size, everywhere, cut, STRATEGIES[name], kill)
    found = lines(cut)
    assert list(found) == list(uninterrupted) == list(range(1, STEPS + 1))
    assert sorted(label for step in range(1, 11) for label in found[step]["order"]) == list(range(SAMPLES))
    for step, line in uninterrupted.items():
        assert found[step]["order"] == line["order"], step
        assert found[step]["drawn"] == line["drawn"], step
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-5), step
    ledger = [json.loads(line) for line in (cut / "own" / "ledger.jsonl").read_text().splitlines()]
    assert [(one["step"], one["world_size"]) for one in ledger if one["event"] == "segment"] == [(0, 2), (3, 3), (6, 1)]
    segments = [json.loads(line)["step"] for line in (cut / "lines").read_text().splitlines()]
    assert segments == [1, 2, 3, 4, 4, 5, 6, 7, *range(7, STEPS + 1)], "each kill cost the steps since the checkpoint"


def on_each(folder: Path, stop_at: int) -> list[list[float]]:
    """Unkeyed draws: only the loop seeds numpy's and Python's generators, differently on each rank."""
    user = user_module()
    found = []
    with disttrain.Engine(config(folder), [*QUIET, *STRATEGIES["ddp"]]) as engine:
        prepared(engine)
        own = ScriptGenerator(engine.rank)
        engine.track("own", own, per_rank=True)
        np.random.seed(1000 + engine.rank)
        random.seed(2000 + engine.rank)
        batches: Iterator[Any] = engine.batches(
            user.Augmented(SAMPLES), global_batch=BATCH, micro_batch=MICRO, seed_generators=False
        )
        for step in batches:
            found.append([*draws()[1:], own.draw()])
            engine.accumulate("model", step, lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])))
            engine.step("model")
            engine.log()
            if engine.should_stop() or engine.progress.steps == stop_at:
                break
    return found


def test_each_ranks_draws_continue_after_two_resumes(tmp_path: Path) -> None:
    uninterrupted = run_world(2, on_each, tmp_path / "uninterrupted", STEPS)
    parts = [run_world(2, on_each, tmp_path / "cut", stop_at) for stop_at in (4, 8, STEPS)]
    assert [len(part[0]) for part in parts] == [4, 4, STEPS - 8]
    for rank in range(2):
        assert [one for part in parts for one in part[rank]] == uninterrupted[rank]
    assert all(a != b for step in zip(*uninterrupted, strict=True) for a, b in zip(*step, strict=True)), (
        "ranks draw alike"
    )
