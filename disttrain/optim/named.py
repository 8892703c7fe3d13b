"""Defines the parameters that optimizer factories take: named, and with their global shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PROBE = "?"
"""The name of a parameter in a trial. It belongs to no model, so patterns of names are not checked against it."""


@dataclass(frozen=True)
class NamedParameter:
    """A parameter with its name and its global `shape`. A sharded parameter's own `.shape` may be smaller or empty."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size


MakeOptimizer = Callable[[Sequence[NamedParameter]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]
