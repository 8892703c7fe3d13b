"""Optimizers, parameter groups and schedules. Enters: strategy (factories), engine (composition)."""

from disttrain.optim.build import decay_groups, optimizer_factory, schedule_factory
from disttrain.optim.named import MakeOptimizer, MakeSchedule, NamedParameter

__all__ = ["MakeOptimizer", "MakeSchedule", "NamedParameter", "decay_groups", "optimizer_factory", "schedule_factory"]
