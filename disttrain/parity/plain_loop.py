"""A plain PyTorch training loop, without a line of disttrain: the reference for `parity` and for the contract suite.

Model, micro-batches, seeds and learning rates are arguments. The loss of a step is, for each term, the sum of its
items' losses over the sum of their weights. The gradient is the gradient of that loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Total = Tensor | Mapping[str, Tensor]
Weight = Any
"""A number, or a mapping from term to number where the total is a mapping."""


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Sequence[Any]],
    loss: Callable[[nn.Module, Any], tuple[Total, Weight]],
    *,
    parameters: Sequence[Tensor] | None = None,
    weigh: Callable[[Any], Mapping[str, Any]] | None = None,
    rates: Sequence[float] | None = None,
    schedule: Any = None,
    clip: float | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    before_clip: Callable[[float], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[list[float], list[float | None]]:
    """Trains `model` and returns each step's loss and its gradient norm before clipping. Local.

    Args:
        steps: for each step, its micro-batches.
        loss: maps (model, micro-batch) to the summed loss and its weight, or to mappings of both by term.
        parameters: what is trained; by default every parameter of the model that requires a gradient.
        weigh: maps a micro-batch to the weight of each term. Needed for several terms of different weights, because
            the weights must be known before the first backward.
        rates: the learning rate of each step. `schedule`, in its place, is stepped after the optimizer.
        seeds: torch's seed for each micro-batch of each step.
        before_clip: called with the norm while gradients are in `.grad`.
        after_step: called at the end of each step.

    A step of weight zero changes nothing. Its loss is 0.0 and its norm None.
    """
    losses: list[float] = []
    norms: list[float | None] = []
    trained = list(parameters) if parameters is not None else [one for one in model.parameters() if one.requires_grad]
    for number, micro_batches in enumerate(steps):
        optimizer.zero_grad()
        value = _accumulate(model, trained, micro_batches, loss, weigh, seeds[number] if seeds is not None else None)
        norm = None
        if value is not None:
            norm = _norm(trained)
            if before_clip is not None:
                before_clip(norm)
            if clip:
                torch.nn.utils.clip_grad_norm_(trained, clip)
            if rates is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rates[number]
            optimizer.step()
            if schedule is not None:
                schedule.step()
        losses.append(value or 0.0)
        norms.append(norm)
        if after_step is not None:
            after_step()
    return losses, norms


def _accumulate(
    model: nn.Module,
    trained: Sequence[Tensor],
    micro_batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], tuple[Total, Weight]],
    weigh: Callable[[Any], Mapping[str, Any]] | None,
    seeds: Sequence[int] | None,
) -> float | None:
    """Leaves the step's gradients in `.grad` and returns its loss, or None if every weight is zero."""
    known: dict[str, float] = {}
    if weigh is not None:
        for batch in micro_batches:
            for term, weight in weigh(batch).items():
                known[term] = known.get(term, 0.0) + float(weight)
    totals: dict[str, float] = {}
    weights: dict[str, float] = dict(known)
    for place, batch in enumerate(micro_batches):
        if seeds is not None:
            torch.manual_seed(seeds[place])
        total, weight = loss(model, batch)
        terms = dict(total) if isinstance(total, Mapping) else {"loss": total}
        by_term = dict(weight) if isinstance(weight, Mapping) else {"loss": weight}
        parts = [part / (known[term] or math.inf) if known else part for term, part in terms.items()]
        torch.autograd.backward(torch.stack(parts).sum())
        for term, part in terms.items():
            totals[term] = totals.get(term, 0.0) + float(part.detach())
            if not known:
                weights[term] = weights.get(term, 0.0) + float(by_term[term])
    if not any(weights.values()):
        return None
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not known:
            parameter.grad /= next(iter(weights.values()))
    return sum(totals[term] / weight for term, weight in weights.items() if weight)


def _norm(trained: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(one.grad.double().square().sum()) for one in trained if one.grad is not None))
