"""Runs the public `Engine` on one rank of a real world, and returns everything that a plain loop needs as data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import disttrain

STRATEGIES: dict[str, list[str]] = {
    "none": ["strategy.name=none"],
    "ddp": ["strategy.name=ddp"],  # the gradients of a small model travel with the sums of the step
    "ddp-buckets": ["strategy.name=ddp", "strategy.ddp.bucket_mb=0.00001"],  # by DistributedDataParallel
    "fsdp": ["strategy.name=fsdp"],
    "zero1": ["strategy.name=deepspeed", "strategy.deepspeed.stage=1"],
    "zero2": ["strategy.name=deepspeed", "strategy.deepspeed.stage=2"],
    "zero3": ["strategy.name=deepspeed", "strategy.deepspeed.stage=3"],
}
QUIET = ["report.every=1", "report.progress=false", "report.plot=false", "report.trackers=[]"]


def strategies_at(size: int, *, fp64: bool = False) -> list[str]:
    """The strategies that run in a world of this size, in this precision."""
    return [name for name in STRATEGIES if (name != "none" or size == 1) and not (fp64 and name.startswith("zero"))]


def train_all(config: Any, folder: Path, cases: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Run every case (a list of overrides) in this world. Returns losses, norms, and the first and last weights."""
    found = {}
    for name, overrides in cases.items():
        where = [f"run.dir={folder}", f"run.name={name.replace('/', '-')}-of-{os.environ['WORLD_SIZE']}"]
        with disttrain.Engine(config, [*QUIET, *overrides, *where]) as engine:
            engine.prepare("model")
            found[name] = train_one(engine)
    return found


def train_one(engine: Any, objective: Any = None) -> dict[str, Any]:
    """Run the plain form of a custom loop and keep the numbers of each step. Only rank 0 returns the weights."""
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
    last = engine.full_weights("model")
    mine = engine.rank == 0
    return {
        "losses": losses,
        "norms": norms,
        "rates": rates,
        "first": to_numpy(first) if mine else {},
        "last": to_numpy(last) if mine else {},
    }


def to_numpy(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Plain arrays, which cross processes without shared memory."""
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for name, value in weights.items()
    }


def worst(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference over the steps."""
    assert len(found) == len(expected), f"{len(found)} steps instead of {len(expected)}"
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))
