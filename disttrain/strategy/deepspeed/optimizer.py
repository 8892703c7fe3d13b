"""The user's optimizer stays the one that DeepSpeed steps, also torch's Adagrad. Imports no deepspeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from disttrain.errors import ConfigError, explain
from disttrain.strategy.deepspeed.deepspeed_internals import is_stage_three


@contextmanager
def seen_as_any_other(optimizer: Optimizer) -> Iterator[None]:
    """Meanwhile an Adagrad is none by its class. DeepSpeed (0.19) puts one of its own making in its place, for what an
    Adagrad has from its constructor on: of one group, and of no schedule."""
    own: type[Optimizer] = type(optimizer)
    if isinstance(optimizer, Adagrad):
        optimizer.__class__ = type(own.__name__, (Optimizer,), {})
    try:
        yield
    finally:
        optimizer.__class__ = own


def refuse_early_state(optimizer: Optimizer) -> None:
    """Raise ConfigError for state that an optimizer has of parameters before its first step. Adagrad's is known."""
    if not isinstance(optimizer, Adagrad) and any(
        isinstance(key, Tensor) and row for key, row in optimizer.state.items()
    ):
        kind = type(optimizer).__qualname__
        raise ConfigError(
            explain(
                "strategy.name=deepspeed puts flat parts in the place of an optimizer's parameters.",
                f"{kind}, which has state of its parameters from the beginning",
                "make state at the first step, where a parameter has none, or use strategy ddp or fsdp",
            )
        )


def move_early_state(optimizer: Optimizer, zero: Any) -> None:
    """Give an Adagrad the state of the flat parts that it steps, in place of that of whole parameters. Local."""
    if isinstance(optimizer, Adagrad):
        flats = zero.fp32_partitioned_groups_flat if is_stage_three(zero) else zero.single_partition_of_fp32_groups
        begun = {key: optimizer.defaults[key] for key in ("initial_accumulator_value", "fused")}
        optimizer.state.clear()
        optimizer.state.update(torch.optim.Adagrad(flats, **begun).state)
