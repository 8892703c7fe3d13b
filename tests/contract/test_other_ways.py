"""Ranks that go other ways through a model: as a plain loop where a strategy can, refused by name where it cannot.

Without that, collectives would pair one expert with another: equal shapes, no error, other numbers (13 % of the loss).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import STRATEGIES, train_all, worst
from contract.test_user_models import BATCH, SEED, SOURCE, STEPS, YAML, user_module
from plain import plain_loop
from torch.utils.data import default_collate
from world import run_world

from disttrain.data import Order
from disttrain.errors import TrainingError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shutil.copy(SOURCE, tmp_path / "user_models.py")
    text = YAML.format(model="Routed").replace("micro_batch: 2", "micro_batch: 1")  # so that experts are called singly
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


def refused(config: Path, name: str) -> str:
    try:
        train_all(config, config.parent / "runs", {name: STRATEGIES[name]})
    except TrainingError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize(
    ("name", "part"),
    [("fsdp", "experts."), ("zero1", "experts.0."), ("zero2", "experts.0."), ("zero3", "experts.")],
)
def test_others_refuse_before_a_weight_changes(name: str, part: str, config: Path) -> None:
    told: list[Any] = run_world(2, refused, config, name)
    assert told[0] == told[1]
    assert (
        "go through the same parts" in told[0] and "use strategy ddp" in told[0] and "strategy.fsdp.blocks" in told[0]
    )
    assert part in told[0] or "another order" in told[0]
    metrics = next((config.parent / "runs").glob("*/metrics.jsonl"), None)
    assert metrics is None or len(metrics.read_text().splitlines()) < STEPS
