"""Evaluates a model on one dataset. Every sample counts once, for any world size, and the model does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from disttrain.data import EvaluationBatches
from disttrain.engine.datasets import to_device
from disttrain.objective import Objective
from disttrain.strategy import Prepared, World
from disttrain.strategy.step.arithmetic import seed_micro_batch
from disttrain.strategy.step.step_sums import SumCollector


def evaluate_set(
    world: World, prepared: Prepared, objective: Objective, dataset: Any, *, micro_batch: int, collate: Any
) -> dict[str, float]:
    """Return `loss` and the values that the objective summarizes. Collective: one all-reduce for the complete set."""
    collector = SumCollector(world)
    batches = EvaluationBatches(
        dataset, seed=world.seed, micro_batch=micro_batch, part=world.mesh.part, collate=collate
    )
    prepared.calls.restart()
    with torch.no_grad(), evaluating(prepared.model, prepared.objective):
        for micro in batches:
            context = seed_micro_batch(world, prepared, micro, training=False)
            with world.computing():
                loss = objective(prepared.model, to_device(micro, world.device).batch, context)
            collector.add(loss, real=micro.real)
    sums = collector.reduce(calls=prepared.calls)
    return {"loss": sums.loss} | objective.summarize(sums.sums, sums.totals, sums.weights)


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Set evaluation mode, and restore each submodule's mode on exit: frozen batch norms stay frozen. Local."""
    training = [module for root in modules if root is not None for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
