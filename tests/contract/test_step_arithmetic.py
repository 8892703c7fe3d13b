"""Difficult arithmetic of a step: ragged weights, dropout, terms with separate denominators, uneven batches.

Every strategy on 1 to 4 ranks is compared with one plain loop. Only the order of float32 sums differs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, train_all, train_one, worst
from contract.test_user_models import SOURCE, user_module
from plain import plain_loop
from torch import Tensor
from torch.utils.data import default_collate
from world import run_world

import disttrain
from disttrain.data import Order
from disttrain.runtime.seeds import derive_seed

SEED, STEPS, BATCH = 11, 8, 32

YAML = """
version: 1
run: {seed: 11, steps: 8, name: mine}
model: {target: "user_models:NanoGPT", args: {dropout: 0.2}}
objective: {target: "user_models:token_loss"}
data: {train: {target: "user_models:Tokens", args: {size: 70}}, global_batch: 32, micro_batch: 4}
optim: {target: torch.optim.SGD, args: {lr: 0.3, momentum: 0.9}, clip_norm: 0.4}
checkpoint: {at_end: false}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shutil.copy(SOURCE, tmp_path / "user_models.py")
    (tmp_path / "mine.yaml").write_text(YAML)
    return tmp_path / "mine.yaml"


def micro_batches(data: Any, micro_batch: int) -> list[list[Any]]:
    """The micro-batches of each step: 32, 32 and the epoch's last 6 of 70 samples. The indices are passed as data."""
    order, epoch, position, steps = Order(len(data), SEED), 0, 0, []
    for _ in range(STEPS):
        if position == len(data):
            epoch, position = epoch + 1, 0
        count = min(BATCH, len(data) - position)
        items = [data[i] for i in order.indices(epoch, position, count).tolist()]
        steps.append([default_collate(items[at : at + micro_batch]) for at in range(0, count, micro_batch)])
        position += count
    return steps


def reference(micro_batch: int, *, clip: float | None, dropout: float) -> tuple[list[float], list[float]]:
    """The plain loop. The seeds of each micro-batch's dropout are passed as data too."""
    user = user_module()
    torch.manual_seed(SEED)
    model = user.NanoGPT(dropout=dropout)
    steps = micro_batches(user.Tokens(70), micro_batch)
    seeds = [[derive_seed(SEED, "step", "model", k, j) for j in range(len(step))] for k, step in enumerate(steps)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return plain_loop(model, optimizer, steps, user.token_loss, clip=clip, seeds=seeds)


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))])
def test_ragged_weights_and_dropout(size: int, config: Path) -> None:
    third = -(-BATCH // (3 * size))  # three rounds of accumulation, the last one uneven
    cases, plain = {}, {}
    for clip, micro_batch in ((0.4, 4), (None, third)):
        plain[clip] = reference(micro_batch, clip=clip, dropout=0.2)
        for name in strategies_at(size):
            cut = f"optim.clip_norm={clip or 'null'}"
            cases[f"{name}/{clip}"] = [*STRATEGIES[name], f"data.micro_batch={micro_batch}", cut]
    found = run_world(size, train_all, config, config.parent / "runs", cases)[0]
    for (name, run), clip in ((item, clip) for clip in plain for item in found.items() if item[0].endswith(f"/{clip}")):
        assert worst(run["losses"], plain[clip][0]) < 2e-5, name
        assert worst(run["norms"], plain[clip][1]) < 2e-5, name


class Terms:
    """Two terms: one over all targets, one over the sequences that start with an even token (sometimes none)."""

    def weigh(self, batch: Any) -> dict[str, Any]:
        inputs, targets = batch
        return {"tokens": (targets != -100).sum(), "even": int((inputs[:, 0] % 2 == 0).sum())}

    def forward(self, model: Any, batch: Any) -> Any:
        return model(batch[0])

    def loss(self, logits: Tensor, batch: Any) -> dict[str, Tensor]:
        inputs, targets = batch
        tokens = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return {"tokens": tokens, "even": logits[inputs[:, 0] % 2 == 0, 0].square().sum()}


def train_terms(config: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        where = [f"run.dir={config.parent / 'runs'}", f"run.name={name}"]
        more = ["data.micro_batch=3", "model.args.dropout=0.0"]
        with disttrain.Engine(config, [*QUIET, *STRATEGIES[name], *more, *where]) as engine:
            engine.prepare("model")
            found[name] = train_one(engine, Terms())
    return found


def plain_terms(micro_batch: int) -> tuple[list[float], list[float]]:
    """Each term over its sum of weights, over the complete global batch: the loop's one batch has weight 1."""
    user, terms = user_module(), Terms()
    torch.manual_seed(SEED)
    model = user.NanoGPT()

    def loss(model: Callable[..., Tensor], batch: Any) -> tuple[Tensor, int]:
        totals, weights = terms.loss(model(batch[0]), batch), terms.weigh(batch)
        return sum((totals[term] / weights[term] for term in totals if weights[term]), torch.zeros(())), 1

    whole = [[next(iter(step))] for step in micro_batches(user.Tokens(70), BATCH)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return plain_loop(model, optimizer, whole, loss, clip=0.4)


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_terms_have_separate_denominators(size: int, config: Path) -> None:
    losses, norms = plain_terms(3)
    for rank, runs in enumerate(run_world(size, train_terms, config, strategies_at(size))):
        for name, run in runs.items():
            assert worst(run["losses"], losses) < 2e-5, (name, rank)
            assert worst(run["norms"], norms) < 2e-5, (name, rank)
