"""Runs contract cases on one rank of a world, each with its own Engine, and returns their numbers."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from disttrain.config import load_config
from disttrain.engine import Engine
from disttrain.runtime import plan_mesh, read_launch
from disttrain.testing.cases import BATCH, MODELS, OPTIMIZERS, SAMPLES, SEED, STEPS, Case

_QUIET = {"every": 1, "progress": False, "plot": False, "trackers": []}


@dataclass
class Ran:
    """One case on one rank: losses and norms by step, and the weights before and after as arrays (rank 0 only).

    `error` is the traceback of a case that failed.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def run_cases(overrides: Sequence[str], cases: Sequence[Case], folder: Path) -> list[Ran]:
    """Runs the cases up to the first failure, which is the last result in the list. Collective."""
    found = []
    for number, case in enumerate(cases):
        ran = Ran()
        found.append(ran)
        try:
            config = load_config(_config(case, folder / str(number)), list(overrides))
            share = -(-BATCH // (case.accumulation * _parts(config.mesh)))
            _train(load_config(config, [f"data.micro_batch={share}"]), ran)
        except Exception:  # noqa: BLE001 - any error of a strategy is reported with its case
            ran.error = traceback.format_exc()
            break
    return found


def _config(case: Case, folder: Path) -> Mapping[str, Any]:
    return {
        "run": {"name": "case", "dir": str(folder), "seed": SEED, "steps": STEPS, "device": "cpu", "timeout_s": 60},
        "model": MODELS[case.model],
        "objective": {"target": "disttrain.testing.models:objective"},
        "data": {
            "train": {"target": "disttrain.testing.models:Sequences", "args": {"size": SAMPLES}},
            "global_batch": BATCH,
        },
        "optim": {**OPTIMIZERS[case.optimizer], "clip_norm": case.clip, "decay_vectors": True},
        "precision": {"compute": case.precision},
        "checkpoint": {"at_end": False},
        "report": _QUIET,
    }


def _parts(mesh: Any) -> int:
    world_size = read_launch().world_size
    return plan_mesh(world_size, replicate=mesh.replicate, shard=mesh.shard, tensor=mesh.tensor).data_parallel


def _train(config: Any, ran: Ran) -> None:
    with Engine(config) as engine:
        engine.prepare("model")
        ran.first = _arrays(engine)
        for micro_batches in engine.batches():
            ran.losses.append(engine.accumulate("model", micro_batches).loss)
            ran.norms.append(engine.step("model").grad_norm)
            engine.log()
            if engine.should_stop():
                break
        ran.last = _arrays(engine)


def _arrays(engine: Engine) -> dict[str, Any]:
    weights: Iterator[tuple[str, Tensor]] = iter(engine.full_weights("model").items())
    return {name: value.numpy() for name, value in weights} if engine.rank == 0 else {}
