"""A parameter as an optimizer's factory sees it: with its name and its global shape, however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PROBE = "?"
"""The name of a parameter that is tried and dropped: none of a model's, so no pattern of names is held against it."""


@dataclass(frozen=True)
class NamedParameter:
    """`shape` is the global one: a sharded parameter's own `.shape` may be a part of it, or empty."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size


MakeOptimizer = Callable[[Sequence[NamedParameter]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]
