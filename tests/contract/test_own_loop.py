"""A custom loop over `Engine` with two datasets, a frozen teacher, a trained objective and tracked state.

Stopped midway and restarted under another strategy at another size, it equals an uninterrupted loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, worst
from contract.test_user_models import user_module
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain.errors import ConfigError

STEPS, HALF = 8, 4


class Distill(nn.Module):
    """Trained with the student: a projection onto the teacher's outputs, and a running count in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(1, 1)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.teacher: Any = None

    def weigh(self, batch: Any) -> int:
        return len(batch[0])

    def forward(self, model: Any, batch: Any) -> Any:
        with torch.no_grad():
            target = self.teacher[0](batch[0])
        return model(batch[0]), target

    def loss(self, output: Any, batch: Any) -> Tensor:
        found, target = output
        return (self.project(found) * self.scale - target).square().sum() + (found - batch[1]).square().sum()


class Mean:
    """Tracked state of a script: numbers and tensors."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"steps": 0, "sum": torch.zeros(3)}

    def add(self, batch: Tensor) -> None:
        self.state = {"steps": self.state["steps"] + 1, "sum": self.state["sum"] + batch.sum(0)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def train(folder: Path, overrides: list[str], stop_at: int) -> dict[str, Any]:
    user = user_module()
    config = {"run": {"name": "own", "dir": str(folder), "seed": 7, "steps": STEPS}}
    with disttrain.Engine(config, [*QUIET, *overrides]) as engine:
        torch.manual_seed(1)
        objective, mean, losses = Distill(), Mean(), []
        make_adam = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
        engine.prepare("student", user.Slope, make_adam, objective=objective)
        objective.teacher = [engine.prepare("teacher", user.Slope)]
        engine.track("mean", mean)
        labelled = engine.batches(user.Augmented(20), global_batch=6, micro_batch=2)
        others = engine.batches(user.Augmented(9), name="others", global_batch=4, micro_batch=1)
        for step, more in zip(labelled, others, strict=False):
            losses.append(engine.accumulate("student", [*step, *more], objective).loss)
            engine.step("student")
            seen = sum((micro.batch[0].sum(0) for micro in step if micro.real), torch.zeros(3))[None]
            torch.distributed.all_reduce(seen)
            mean.add(seen)
            engine.log()
            if engine.progress.steps == stop_at:
                engine.save()
                break
        return {
            "losses": losses,
            "sum": mean.state["sum"].tolist(),
            "steps": mean.state["steps"],
            "last": {name: value.tolist() for name, value in engine.full_weights("student").items()},
            "teacher": {name: value.tolist() for name, value in engine.full_weights("teacher").items()},
        }


@pytest.mark.parametrize(("name", "size"), [("none", 1), ("fsdp", 3), ("zero2", 2), ("zero3", 3)])
def test_a_run_continued_under_another_strategy_equals_an_uninterrupted_one(
    name: str, size: int, tmp_path: Path
) -> None:
    whole = run_world(2, train, tmp_path / "whole", STRATEGIES["ddp"], STEPS)[0]
    first = run_world(2, train, tmp_path / "cut", STRATEGIES["ddp"], HALF)[0]
    second = run_world(size, train, tmp_path / "cut", STRATEGIES[name], STEPS)[0]
    assert worst([*first["losses"], *second["losses"]], whole["losses"]) < 2e-5
    assert second["steps"] == STEPS
    torch.testing.assert_close(torch.tensor(second["sum"]), torch.tensor(whole["sum"]))
    for key in ("last", "teacher"):
        for weight, value in whole[key].items():
            torch.testing.assert_close(torch.tensor(second[key][weight]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_two_datasets_need_two_names(tmp_path: Path) -> None:
    user = user_module()
    config = {"run": {"name": "own", "dir": str(tmp_path), "steps": 2}, "strategy": {"name": "none"}}
    with disttrain.Engine(config, QUIET) as engine:
        engine.batches(user.Augmented(20), global_batch=6)
        with pytest.raises(ConfigError, match="pass a different name="):
            engine.batches(user.Augmented(9), global_batch=4)
