"""Ranks whose backwards reach the same parameters in different orders equal a plain loop under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, worst
from plain import plain_loop
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from world import run_world

import disttrain

SEED, STEPS, ROUNDS = 5, 4, 2
SMALL = ["strategy.deepspeed.bucket_mb=0.0004"]  # 104 elements: one of an expert's 81 and 90
WHOLE = ["strategy.deepspeed.native={zero_optimization: {stage3_param_persistence_threshold: 0}}"]


class Packed(nn.Module):
    """Sequences of one length in a batch and of several in the next, so that its backward takes other paths in the
    LSTM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 9)
        self.lstm = nn.LSTM(9, 9, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(18, 1)

    def forward(self, batch: Any) -> Tensor:
        tokens, lengths = batch["tokens"], batch["lengths"]
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        hidden: Tensor = self.lstm(packed)[1][0]
        y: Tensor = self.head(torch.cat((hidden[-2], hidden[-1]), dim=1))
        return y


class Ordered(nn.Module):
    """Two experts of one shape, both called for every batch. The batch sets their order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 9)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)) for _ in range(2))
        self.head = nn.Linear(9, 1)

    def forward(self, batch: Any) -> Tensor:
        x = torch.tanh(self.embed(batch["tokens"]).mean(1))
        for expert in (1, 0) if batch["swapped"] else (0, 1):
            x = x + (expert + 1) * self.experts[expert](x)
        y: Tensor = self.head(x)
        return y


def batches(step: int, size: int) -> list[dict[str, Any]]:
    """Micro-batches of two for all ranks, one after another."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(ROUNDS * size):
        lengths = torch.randint(1, 7, (2,), generator=generator) if number % 2 else torch.tensor([6, 6])
        tokens = torch.randint(0, 11, (2, int(lengths.max())), generator=generator)
        made.append({"tokens": tokens, "lengths": lengths, "swapped": bool(number % 2)})
    return made


def square(model: Any, batch: Any) -> Any:
    return model(batch).sub(1.0).square().sum(), len(batch["tokens"])


def train(folder: Path, model: type[nn.Module], cases: dict[str, Sequence[str]]) -> dict[str, Any]:
    found = {}
    for name, overrides in cases.items():
        config = {"run": {"name": name, "dir": str(folder), "seed": SEED, "steps": STEPS, "timeout_s": 60}}
        with disttrain.Engine(config, [*QUIET, *overrides, "checkpoint.at_end=false"]) as engine:
            engine.prepare("model", model, lambda own: torch.optim.SGD(own, lr=0.05, momentum=0.9))
            losses, norms = [], []
            for step in range(STEPS):
                mine = engine.micro_batches(batches(step, engine.world_size)[engine.rank :: engine.world_size])
                losses.append(engine.accumulate("model", mine, square).loss)
                norms.append(engine.step("model").grad_norm)
                engine.log()
            found[name] = losses, norms
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [Packed, Ordered])
def test_equals_a_plain_loop(model: type[nn.Module], size: int, tmp_path: Path) -> None:
    cases: dict[str, Sequence[str]] = {"ddp-buckets": STRATEGIES["ddp-buckets"]}
    for name in ("zero1", "zero2", "zero3"):
        if model is Packed or name != "zero3":  # rejects calls in another order, by name
            more = WHOLE if name == "zero3" else []
            cases |= {name: [*STRATEGIES[name], *more], f"{name}-small": [*STRATEGIES[name], *more, *SMALL]}
    torch.manual_seed(SEED)
    plain = model()
    steps = [batches(step, size) for step in range(STEPS)]
    losses, norms = plain_loop(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), steps, square)
    for run in run_world(size, train, tmp_path, model, cases):
        for name, found in run.items():
            assert worst(found[0], losses) < 2e-5, name
            assert worst(found[1], norms) < 2e-5, name
