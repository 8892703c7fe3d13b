"""Runs of the public `Engine` on one rank of a real world, with everything a plain loop needs brought back as data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import disttrain

STRATEGIES: dict[str, list[str]] = {
    "none": ["strategy.name=none"],
    "ddp": ["strategy.name=ddp"],
    "fsdp": ["strategy.name=fsdp"],
    "zero1": ["strategy.name=deepspeed", "strategy.deepspeed.stage=1"],
    "zero2": ["strategy.name=deepspeed", "strategy.deepspeed.stage=2"],
    "zero3": ["strategy.name=deepspeed", "strategy.deepspeed.stage=3"],
}


def strategies_at(size: int) -> list[str]:
    """Those that run in a world of this size."""
    return [name for name in STRATEGIES if name != "none" or size == 1]


def train_all(config: Any, folder: Path, cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Every case (a list of overrides) in turn, in this world: losses, norms, first and last weights."""
    found = {}
    for name, overrides in cases.items():
        where = [f"run.dir={folder}", f"run.name={name.replace('/', '-')}-{os.environ['WORLD_SIZE']}"]
        with disttrain.Engine(config, [*overrides, *where, "report.progress=false", "report.plot=false"]) as engine:
            found[name] = train_one(engine)
    return found


def train_one(engine: Any, objective: Any = None) -> dict[str, Any]:
    """The plain shape of an own loop, keeping each step's numbers."""
    if not engine._prepared:
        engine.prepare("model")
    first = engine.full_weights("model")
    losses, norms, rates = [], [], []
    for micro_batches in engine.batches():
        sums = engine.accumulate("model", micro_batches, objective)
        outcome = engine.step("model")
        engine.log()
        losses.append(sums.loss)
        norms.append(outcome.grad_norm)
        rates.append(outcome.lr)
        if engine.should_stop():
            break
    return {"losses": losses, "norms": norms, "rates": rates, "first": first, "last": engine.full_weights("model")}


def worst(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    assert len(found) == len(expected), f"{len(found)} steps instead of {len(expected)}"
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))


def equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
