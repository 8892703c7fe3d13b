"""Trains the plain loop on a case's model, data and optimizer in one process, as the reference for every strategy.

The order of samples comes from disttrain; everything else is plain PyTorch. A second run in float64 separates true
zeros from rounding errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from disttrain.config import resolve_target
from disttrain.data import Order
from disttrain.parity.plain_loop import plain_loop
from disttrain.testing.cases import BATCH, MODELS, OPTIMIZERS, SAMPLES, SEED, STEPS
from disttrain.testing.models import Sequences, summed_loss

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


@dataclass(frozen=True)
class Reference:
    """Losses and norms by step, and the state dicts before and after.

    `largest` holds the largest gradient of each trainable parameter over the steps, entry by entry.
    """

    losses: list[float]
    norms: list[float]
    first: dict[str, Tensor]
    last: dict[str, Tensor]
    largest: dict[str, Tensor]

    @property
    def norm(self) -> float:
        """The largest gradient norm."""
        return max(self.norms)


@cache
def reference(model: str, optimizer: str, clip: float | None, precision: str) -> Reference:
    """Runs the plain loop with one batch per step. bf16 is torch's autocast over float32. Local."""
    module = build(model)
    first = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.to(_DTYPES[precision])
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    largest = {name: torch.zeros_like(value) for name, value in trainable.items()}

    def watch(norm: float) -> None:
        for name, parameter in trainable.items():
            assert parameter.grad is not None
            torch.maximum(largest[name], parameter.grad.abs(), out=largest[name])

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def loss(model: nn.Module, numbered: tuple[int, Any]) -> tuple[Tensor, int]:
        with computing():
            return summed_loss(model, numbered[1], numbered[0])

    make = resolve_target(OPTIMIZERS[optimizer]["target"], section="optim", folder=None)
    stepper = make(list(trainable.values()), **OPTIMIZERS[optimizer]["args"])
    steps = [[numbered] for numbered in enumerate(batches())]
    losses, norms = plain_loop(module, stepper, steps, loss, clip=clip, before_clip=watch)
    assert None not in norms  # no step has weight zero
    return Reference(losses, [norm for norm in norms if norm is not None], first, dict(module.state_dict()), largest)


def build(model: str) -> nn.Module:
    """Builds the model of a case with its constructor under the seed. Local."""
    make = resolve_target(MODELS[model]["target"], section="model", folder=None)
    torch.manual_seed(SEED)
    built: nn.Module = make(**MODELS[model].get("args", {}))
    return built


def batches() -> Iterator[Any]:
    """Yields the global batch of each step. The last batch of an epoch of SAMPLES samples is short."""
    data, order = Sequences(SAMPLES), Order(SAMPLES, SEED)
    epoch = position = 0
    for _ in range(STEPS):
        if position == SAMPLES:
            epoch, position = epoch + 1, 0
        count = min(BATCH, SAMPLES - position)
        yield default_collate([data[index] for index in order.indices(epoch, position, count).tolist()])
        position += count
