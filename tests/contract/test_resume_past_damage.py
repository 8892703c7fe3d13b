"""A resume past a damaged checkpoint that had already filled tensors on every rank keeps nothing of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, worst
from contract.test_user_models import user_module
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain.checkpoint import Checkpoint, list_checkpoints
from disttrain.errors import CheckpointError

STEPS, SAVED = 7, (2, 4)


class Late(nn.Module):
    """One layer is first used after the third step. Until then no optimizer has state for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 1)

    def forward(self, x: Tensor, joined: bool) -> Tensor:
        x = torch.tanh(self.first(x))
        y: Tensor = self.last(x + self.late(x) if joined else x)
        return y


class Counting(torch.optim.Optimizer):
    """Momentum whose state has a Python number, from a parameter's third step a tensor and a second number, and one
    entry that belongs to no parameter.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.state["calls"] = 0  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.state["calls"] += 1  # type: ignore[operator]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(count=0, momentum=torch.zeros_like(parameter))
                state["count"] += 1
                momentum = state["momentum"]
                momentum.mul_(0.9).add_(parameter.grad)
                if state["count"] > 2:
                    state.setdefault("slow", torch.zeros_like(parameter)).lerp_(momentum, 0.1)
                    state["late"] = state.get("late", 1.0) * 0.5
                    momentum = momentum + state["late"] * state["slow"]
                parameter.add_(momentum, alpha=-group["lr"] / state["count"])


OPTIMIZERS = {"adam": lambda own: torch.optim.Adam(own, lr=0.05), "counting": lambda own: Counting(own, lr=0.02)}


def go(folder: Path, name: str, overrides: Sequence[str], optimizer: str, stop_at: int) -> Any:
    """Returns the losses of the steps that were taken, or why there were none."""
    config = {"run": {"name": name, "dir": str(folder), "seed": 7, "steps": STEPS}, "checkpoint": {"keep_last": 9}}
    losses = []

    def objective(model: Any, batch: Any) -> Any:
        return (model(batch[0], engine.progress.steps >= SAVED[0]) - batch[1]).square().sum(), len(batch[0])

    try:
        with disttrain.Engine(config, [*QUIET, *overrides, "checkpoint.at_end=false"]) as engine:
            engine.prepare("model", Late, OPTIMIZERS[optimizer])
            for batches in engine.batches(user_module().Augmented(20), global_batch=6, micro_batch=2):
                losses.append(engine.accumulate("model", batches, objective).loss)
                engine.step()
                engine.log()
                if engine.progress.steps in SAVED:
                    engine.save()
                if engine.progress.steps == stop_at:
                    break
    except CheckpointError as error:
        return str(error)
    return losses


def damage(path: Path) -> str:
    """Changes the last byte of every file of a checkpoint."""
    for file in path.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    return path.name


SHARDED = {
    "hsdp": [*STRATEGIES["fsdp"], "mesh.replicate=2"],
    "offload": [*STRATEGIES["fsdp"], "strategy.fsdp.offload=true"],
}


@pytest.mark.parametrize(
    ("strategy", "size", "optimizer"),
    [
        ("none", 1, "counting"),
        ("ddp", 2, "counting"),
        ("hsdp", 4, "counting"),
        ("zero3", 2, "adam"),
        *(
            pytest.param(name, size, "adam", marks=pytest.mark.slow)
            for name, size in (("fsdp", 3), ("offload", 2), ("zero1", 2), ("zero2", 3))
        ),
    ],
)
def test_state_that_only_the_damaged_checkpoint_has_is_gone(
    strategy: str, size: int, optimizer: str, tmp_path: Path
) -> None:
    overrides = SHARDED.get(strategy) or STRATEGIES[strategy]
    expected = run_world(size, go, tmp_path, "whole", overrides, optimizer, STEPS)[0]
    run_world(size, go, tmp_path, "run", overrides, optimizer, 5)
    _, newest = list_checkpoints(tmp_path / "run" / "checkpoints")
    damage(newest)
    found = run_world(size, go, tmp_path, "run", overrides, optimizer, STEPS)[0]
    assert len(found) == STEPS - SAVED[0]
    assert worst(found, expected[SAVED[0] :]) < 1e-6


def test_a_run_without_an_intact_checkpoint_ends_and_names_all(tmp_path: Path) -> None:
    run_world(2, go, tmp_path, "run", STRATEGIES["ddp"], "adam", 5)
    names = [damage(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    for text in run_world(2, go, tmp_path, "run", STRATEGIES["ddp"], "adam", STEPS):
        assert "none of its checkpoints is intact" in text
        assert all(name in text for name in names)


def insist(folder: Path, good: Path) -> list[str]:
    """Returns the answers of an engine that could not resume, to each later call."""
    config = {"run": {"name": "run", "dir": str(folder), "seed": 7, "steps": STEPS}, "checkpoint": {"keep_last": 9}}
    said = []
    engine = disttrain.Engine(config, [*QUIET, *STRATEGIES["ddp"], "checkpoint.at_end=false"])
    engine.prepare("model", Late, OPTIMIZERS["adam"])
    engine.load(good)
    with pytest.raises(CheckpointError, match="none of its checkpoints is intact"):
        engine.resume()
    if engine.rank == 0:
        for path in list_checkpoints(folder / "run" / "checkpoints"):
            path.rename(folder / path.name)
    engine.world.group.barrier()
    for act in (
        engine.resume,  # no checkpoint is left now: it would restart from scratch
        engine.save,  # of the step that was loaded
        lambda: engine.load(good),
        lambda: engine.micro_batches([torch.zeros(2, 3)]),
        lambda: engine.backward("model", torch.zeros((), requires_grad=True)),
        engine.full_weights,
    ):
        try:
            act()
        except CheckpointError as error:
            said.append(str(error))
    engine.close()
    return said


def test_an_engine_that_could_not_resume_rejects_every_later_call(tmp_path: Path) -> None:
    run_world(2, go, tmp_path, "run", STRATEGIES["ddp"], "adam", 5)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    good = shutil.copytree(saved[0], tmp_path / "good" / saved[0].name)
    for path in saved:
        damage(path)
    for said in run_world(2, insist, tmp_path, good):
        assert len(said) == 6
        assert all("partly read from a checkpoint" in text for text in said)


class Wider(Late):
    """The same names with another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(7, 8)


def fail_to_load(folder: Path, paths: Sequence[Path], strategy: str, model: type[nn.Module]) -> Any:
    """Loads that fail. Returns what a script computes that then starts from scratch."""
    config = {"run": {"name": "scratch", "dir": str(folder), "seed": 7, "steps": STEPS}}
    losses = []
    with disttrain.Engine(config, [*QUIET, *STRATEGIES[strategy], "checkpoint.at_end=false"]) as engine:
        engine.prepare("model", model, OPTIMIZERS["counting"])
        for path in paths:
            with pytest.raises(CheckpointError):  # also on the ranks that find no fault
                engine.load(path)
            with pytest.raises(CheckpointError):
                engine.load_weights("model", path)
        for batches in engine.batches(user_module().Augmented(20), global_batch=6, micro_batch=2):
            square = lambda model, batch: (  # noqa: E731
                (model(batch[0], False) - batch[1]).square().sum(),
                len(batch[0]),
            )
            losses.append(engine.accumulate("model", batches, square).loss)
            engine.step()
            engine.log()
            if engine.should_stop():
                break
    return losses


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_script_starts_from_scratch_after_a_load_failed_on_one_rank(strategy: str, tmp_path: Path) -> None:
    """The damage is in a part that one rank alone reads, or in another model's shape.

    Nothing was written on any rank.
    """
    run_world(2, go, tmp_path, "run", STRATEGIES["fsdp"], "counting", 5)
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    torn = shutil.copytree(path, tmp_path / "torn" / path.name)
    (_, rows) = Checkpoint.open(torn).locate("model/model/first.weight")
    assert rows.file == "rank-00001.safetensors"
    content = bytearray((torn / rows.file).read_bytes())
    content[rows.start] ^= 1
    (torn / rows.file).write_bytes(content)
    for model, paths in ((Late, [torn]), (Wider, [path, torn])):
        expected = run_world(2, fail_to_load, tmp_path / f"{model.__name__}-plain", [], strategy, model)
        found = run_world(2, fail_to_load, tmp_path / model.__name__, paths, strategy, model)
        assert found == expected
