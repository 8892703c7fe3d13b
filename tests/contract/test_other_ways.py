"""Ranks that use different modules equal a plain loop if the strategy supports it, and are rejected by name otherwise.

Without that check, collectives would pair different experts: equal shapes, no error, a loss that is 13 % off.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, train_all, worst
from contract.test_user_models import BATCH, SEED, SOURCE, STEPS, YAML, user_module
from plain import plain_loop
from torch import Tensor, nn
from torch.utils.data import default_collate
from world import run_world

import disttrain
from disttrain.data import Order
from disttrain.errors import TrainingError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shutil.copy(SOURCE, tmp_path / "user_models.py")
    # so that experts are called one at a time
    text = YAML.format(model="Routed").replace("micro_batch: 2", "micro_batch: 1")
    (tmp_path / "routed.yaml").write_text(text)
    return tmp_path / "routed.yaml"


def expected() -> tuple[list[float], list[float]]:
    user = user_module()
    torch.manual_seed(SEED)
    model, data = user.Routed(), user.Tokens()
    order, steps = Order(len(data), SEED), []
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, len(data))
        steps.append([default_collate([data[i]]) for i in order.indices(epoch, position, BATCH).tolist()])
    return plain_loop(model, torch.optim.AdamW(model.parameters(), lr=0.01), steps, user.token_loss, clip=0.4)


@pytest.mark.parametrize("size", [2, 3])
def test_ddp_and_fsdp_as_one_group_equal_a_plain_loop(size: int, config: Path) -> None:
    ddp = {name: STRATEGIES[name] for name in ("ddp", "ddp-buckets")}
    cases = {**ddp, "fsdp": [*STRATEGIES["fsdp"], "strategy.fsdp.blocks=[]"]}
    for name, run in run_world(size, train_all, config, config.parent / "runs", cases)[0].items():
        for found, plain in zip((run["losses"], run["norms"]), expected(), strict=True):
            assert worst(found, plain) < 2e-5, name


def rejected(config: Path, name: str) -> str:
    try:
        train_all(config, config.parent / "runs", {name: STRATEGIES[name]})
    except TrainingError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize(
    ("name", "part"),
    [("fsdp", "experts."), ("zero1", "experts.0."), ("zero2", "experts.0."), ("zero3", "experts.")],
)
def test_other_strategies_reject_before_a_weight_changes(name: str, part: str, config: Path) -> None:
    told: list[Any] = run_world(2, rejected, config, name)
    assert told[0] == told[1]
    assert (
        "ranks call different parts" in told[0] and "use strategy ddp" in told[0] and "strategy.fsdp.blocks" in told[0]
    )
    assert part in told[0] or "another order" in told[0]
    metrics = next((config.parent / "runs").glob("*/metrics.jsonl"), None)
    assert metrics is None or len(metrics.read_text().splitlines()) < STEPS


class Uneven(nn.Module):
    """Experts of three sizes. The first number of the input chooses the expert."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 128), nn.Linear(128, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(128, n), nn.ReLU(), nn.Linear(n, 128)) for n in (96, 256))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        return self.head(hidden + self.experts[int(x[0, 0] > 0)](hidden))


def diverge(folder: Path, name: str, at: int) -> tuple[int, str]:
    """Returns the steps done until the ranks diverge at step `at`, and the error."""
    config = {"run": {"name": "uneven", "dir": str(folder), "seed": SEED, "steps": 3, "timeout_s": 60}}
    try:
        with disttrain.Engine(config, [*QUIET, *STRATEGIES[name]]) as engine:
            engine.prepare("model", Uneven, lambda parameters: torch.optim.AdamW(parameters))
            for step in range(3):
                x = torch.ones(2, 4) * (-1 if step >= at and engine.rank else 1)
                batches = engine.micro_batches([torch.ones(2, 4), x])
                engine.accumulate("model", batches, lambda model, x: (model(x).square().sum(), len(x)))
                engine.step("model")
                engine.log()
    except TrainingError as error:
        return engine.progress.steps, str(error)
    return 3, "nothing raised"


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_modules_of_different_sizes_are_not_gathered_together(name: str, at: int, tmp_path: Path) -> None:
    """gloo would answer with SIGABRT, or hang. 24,800 and 65,920 elements are too many for ZeRO 3 to keep on every
    rank.
    """
    told: list[Any] = run_world(2, diverge, tmp_path, name, at)
    assert told[0] == told[1] and told[0][0] == at
    assert "ranks call different parts" in told[0][1] and "experts.1" in told[0][1] and "experts.0" in told[0][1]
