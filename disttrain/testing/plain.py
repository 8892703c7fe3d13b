"""Plain PyTorch, without a line of disttrain: the loop that everything is compared with.

Model, batches, seeds and rates come in as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Any]],
    loss: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    *,
    rates: Sequence[float] | None = None,
    clip: float | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    watch: Callable[[float], None] | None = None,
) -> tuple[list[float], list[float]]:
    """`steps[k]` is the list of step k's micro-batches; returns each step's loss and gradient norm before clipping.

    The loss of a step is the sum of its items' losses over the sum of their weights, and the gradient is that loss's.
    `watch(norm)` is called before clipping, while gradients stand in `.grad`.
    """
    losses, norms = [], []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, micro_batches in enumerate(steps):
        optimizer.zero_grad()
        total, weight = 0.0, 0.0
        for place, batch in enumerate(micro_batches):
            if seeds is not None:
                torch.manual_seed(seeds[number][place])
            part, items = loss(model, batch)
            torch.autograd.backward(part)
            total, weight = total + float(part.detach()), weight + float(items)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / weight
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trainable if p.grad is not None))
        if watch is not None:
            watch(norm)
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable, clip)
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[number]
        optimizer.step()
        losses.append(total / weight)
        norms.append(norm)
    return losses, norms


def cosine_rates(peak: float, *, warmup: int, steps: int) -> list[float]:
    """Linear warm-up, then half a cosine down to zero at `steps`, for each step from 0."""
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append(peak * (step + 1) / warmup)
        else:
            rates.append(peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
    return rates
