"""Checkpoints with more or less than complete models: trainable parameters only, and per-rank state."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, worst
from contract.test_user_models import user_module
from torch import nn
from world import run_world

import disttrain
from disttrain.checkpoint import Checkpoint, list_checkpoints
from disttrain.errors import CheckpointError, ConfigError

STEPS, HALF = 6, 3


class Adapted(nn.Module):
    """A frozen base of two tensors, a trained adapter on it, and a buffer."""

    def __init__(self, base: float = 1.0) -> None:
        super().__init__()
        self.base = nn.Linear(3, 5)
        self.adapter = nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(1))
        with torch.no_grad():
            self.base.weight.mul_(base)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.adapter(torch.tanh(self.base(x)))
        return y


def objective(model: Any, batch: Any) -> Any:
    return (model(batch[0]) - batch[1]).square().sum(), len(batch[0])


def adapt(folder: Path, name: str, overrides: list[str], stop_at: int, base: float = 1.0) -> Any:
    config = {"run": {"name": name, "dir": str(folder), "seed": 7, "steps": STEPS}}
    losses = []
    try:
        with disttrain.Engine(config, [*QUIET, "checkpoint.only=trainable", *overrides]) as engine:
            engine.prepare("model", lambda: Adapted(base), lambda found: torch.optim.Adam(found, lr=0.05))
            for step in engine.batches(user_module().Augmented(20), global_batch=6, micro_batch=2):
                losses.append(engine.accumulate("model", step, objective).loss)
                engine.step()
                engine.log()
                if engine.should_stop() or engine.progress.steps == stop_at:
                    break
    except CheckpointError as error:
        return str(error)
    return losses


def test_trainable_parameters_alone_continue_over_the_same_base_under_any_strategy(tmp_path: Path) -> None:
    (expected,) = run_world(1, adapt, tmp_path, "whole", ["checkpoint.only=all", *STRATEGIES["none"]], STEPS)
    loaders = {"none": 1, "fsdp": 3, "zero1": 2, "zero3": 2}
    for name, size in loaders.items():
        run_world(2, adapt, tmp_path, name, STRATEGIES["ddp" if name != "none" else "fsdp"], HALF)
        (path,) = list_checkpoints(tmp_path / name / "checkpoints")
        stored = [key for key in Checkpoint.open(path).tensors if key.startswith(("model/", "optim/"))]
        assert not [key for key in stored if "base" in key]
        assert {"model/model/adapter.weight", "model/model/adapter.bias", "model/model/seen"} <= set(stored)
        found = run_world(size, adapt, tmp_path, name, STRATEGIES[name], STEPS)[0]
        assert worst(found, expected[HALF:]) < 1e-5, name


def test_frozen_parameters_of_a_damaged_checkpoint_do_not_stay_if_the_previous_one_lacks_them(
    tmp_path: Path,
) -> None:
    expected = run_world(2, adapt, tmp_path, "whole", STRATEGIES["ddp"], STEPS)[0]
    run_world(2, adapt, tmp_path, "run", [*STRATEGIES["ddp"], "checkpoint.keep_last=9"], 2)
    run_world(2, adapt, tmp_path, "run", [*STRATEGIES["ddp"], "checkpoint.only=all", "checkpoint.keep_last=9"], 4)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (base,) = Checkpoint.open(newest).locate("model/model/base.weight")
    content = bytearray((newest / base.file).read_bytes())
    content[base.start + 3] ^= 1
    (newest / base.file).write_bytes(content)
    found = run_world(2, adapt, tmp_path, "run", STRATEGIES["ddp"], STEPS)[0]
    assert len(found) == STEPS - 2
    assert worst(found, expected[2:]) < 1e-6


def test_trainable_parameters_load_over_the_same_base_only(tmp_path: Path) -> None:
    run_world(2, adapt, tmp_path, "run", STRATEGIES["fsdp"], STEPS)
    run_world(1, adapt, tmp_path, "whole", ["checkpoint.only=all", *STRATEGIES["none"]], STEPS)
    expected = disttrain.load(tmp_path / "whole", make_model=Adapted).state_dict()

    def make(base: float) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)  # run.seed: the initial weights of the frozen part
            return Adapted(base)

    found = disttrain.load(tmp_path / "run", make_model=lambda: make(1.0)).state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-7), name
    with pytest.raises(CheckpointError, match=r"model/model/base\.weight"):
        disttrain.load(tmp_path / "run", make_model=lambda: make(1.5))


def test_another_base_is_rejected_by_name_on_every_rank(tmp_path: Path) -> None:
    run_world(2, adapt, tmp_path, "run", STRATEGIES["fsdp"], HALF)
    for size, name in ((1, "none"), (3, "ddp"), (2, "fsdp")):
        for message in run_world(size, adapt, tmp_path, "run", STRATEGIES[name], STEPS, 1.5):
            assert "model/model/base.weight" in message and "base.bias" not in message
            assert "model.weights" in message
    assert len(run_world(2, adapt, tmp_path, "run", STRATEGIES["ddp"], STEPS)[0]) == STEPS - HALF


def freeze_after_training(folder: Path, stop_at: int) -> dict[str, Any]:
    config = {"run": {"name": "staged", "dir": str(folder), "seed": 7, "steps": STEPS}}
    with disttrain.Engine(config, [*QUIET, "checkpoint.only=trainable", *STRATEGIES["fsdp"]]) as engine:
        model = engine.prepare("model", Adapted, lambda found: torch.optim.Adam(found, lr=0.05))
        for step in engine.batches(user_module().Augmented(20), global_batch=6, micro_batch=2):
            engine.accumulate("model", step, objective)
            engine.step()
            engine.log()
            if engine.progress.steps == 2:
                model.adapter.bias.requires_grad_(False)
            if engine.should_stop() or engine.progress.steps == stop_at:
                break
        return {name: value.numpy() for name, value in engine.full_weights("model").items()}


def test_parameters_that_were_trained_and_then_frozen_are_saved(tmp_path: Path) -> None:
    run_world(2, freeze_after_training, tmp_path, HALF)
    (path,) = list_checkpoints(tmp_path / "staged" / "checkpoints")
    stored = Checkpoint.open(path)
    assert "model/model/adapter.bias" in stored.tensors and "model/model/base.bias" not in stored.tensors
    assert set(stored.document["base"]) == {"model/model/base.weight", "model/model/base.bias"}


# ---------------------------------------------------------------------- per-rank state


class RankState:
    """Tracked: a number and a tensor whose length differs from rank to rank."""

    def __init__(self, rank: int) -> None:
        self.state: dict[str, Any] = {"rank": rank, "count": 0, "seen": torch.full((rank + 1,), float(rank))}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def keep_per_rank(folder: Path, steps: int, strategy: str) -> list[Any]:
    """A custom loop that also draws. Returns its draws by rank, and each rank's tracked state at the end."""
    config = {"run": {"name": "own", "dir": str(folder), "seed": 7, "steps": STEPS}}
    with disttrain.Engine(config, [*QUIET, *STRATEGIES[strategy]]) as engine:
        engine.prepare("model", user_module().Slope, lambda found: torch.optim.Adam(found, lr=0.05))
        own = RankState(engine.rank)
        engine.track("own", own, per_rank=True)
        seed = 100 + engine.rank
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        engine.resume()
        found: dict[str, Any] = {"at start": own.state["count"], "drawn": []}
        x = torch.linspace(0, 1, 12).reshape(4, 3)
        while engine.progress.steps < steps:
            drawn = torch.rand(1).item(), np.random.standard_normal(), random.gauss(0, 1), random.random()
            found["drawn"].append(drawn)
            own.state["count"] += 1
            state = torch.get_rng_state(), np.random.get_state(), random.getstate()
            engine.accumulate("model", engine.micro_batches([(x, x.sum(1, keepdim=True))]), objective)
            torch.set_rng_state(state[0]), np.random.set_state(state[1]), random.setstate(state[2])
            engine.step()
            engine.log()
            if engine.should_stop():
                break
        return [found, {key: value if key != "seen" else value.numpy() for key, value in own.state.items()}]


def test_each_rank_gets_its_state_and_draws_back_after_a_second_resume(tmp_path: Path) -> None:
    through = run_world(2, keep_per_rank, tmp_path / "through", STEPS, "ddp")
    parts = [run_world(2, keep_per_rank, tmp_path / "parts", steps, name) for steps, name in ((2, "fsdp"), (4, "ddp"))]
    parts.append(run_world(2, keep_per_rank, tmp_path / "parts", STEPS, "zero2"))
    for rank in range(2):
        drawn = [one for part in parts for one in part[rank][0]["drawn"]]
        assert drawn == through[rank][0]["drawn"], "bit-equal draws"
        assert parts[-1][rank][1]["rank"] == rank and parts[-1][rank][1]["count"] == STEPS
        assert parts[-1][rank][1]["seen"].tolist() == [float(rank)] * (rank + 1)
        assert [part[rank][0]["at start"] for part in parts] == [0, 2, 4]
    assert through[0][0]["drawn"] != through[1][0]["drawn"]


def test_at_another_world_size_a_new_rank_keeps_its_state(tmp_path: Path) -> None:
    before = run_world(2, keep_per_rank, tmp_path, HALF, "ddp")
    after = run_world(3, keep_per_rank, tmp_path, STEPS, "ddp")
    assert [one[0]["at start"] for one in after] == [HALF, HALF, 0]
    assert [one[1]["seen"].tolist() for one in after] == [[0.0], [1.0] * 2, [2.0] * 3]
    alone = run_world(2, keep_per_rank, tmp_path / "through", STEPS, "ddp")
    for rank in range(2):
        assert before[rank][0]["drawn"] + after[rank][0]["drawn"] == alone[rank][0]["drawn"]


def keep_for_all(folder: Path, per_rank: bool) -> str:
    config = {"run": {"name": "own", "dir": str(folder), "seed": 7, "steps": STEPS}}
    try:
        with disttrain.Engine(config, [*QUIET, *STRATEGIES["none"]]) as engine:
            engine.prepare("model", user_module().Slope, lambda found: torch.optim.Adam(found, lr=0.05))
            engine.track("own", RankState(0), per_rank=per_rank)
            engine.resume()
            x = torch.linspace(0, 1, 12).reshape(4, 3)
            engine.accumulate("model", engine.micro_batches([(x, x.sum(1, keepdim=True))]), objective)
            engine.step()
            engine.log()
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("per_rank", [False, True])
def test_a_state_of_another_kind_is_rejected(per_rank: bool, tmp_path: Path) -> None:
    assert run_world(1, keep_for_all, tmp_path, per_rank) == ["saved"]
    (message,) = run_world(1, keep_for_all, tmp_path, not per_rank)
    assert f"track it {'with' if per_rank else 'without'} per_rank" in message


def track_a_reserved_name(folder: Path) -> None:
    with disttrain.Engine({"run": {"name": "own", "dir": str(folder), "steps": 1}}, QUIET) as engine:
        engine.track("disttrain", RankState(0))


def test_a_reserved_name_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine uses that name"):
        track_a_reserved_name(tmp_path)
