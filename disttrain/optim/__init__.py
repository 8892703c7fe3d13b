"""Builds optimizers, parameter groups and schedules. Strategies call the factories, which the engine makes."""

from disttrain.optim.build import decay_groups, optimizer_factory, schedule_factory
from disttrain.optim.named import MakeOptimizer, MakeSchedule, NamedParameter

__all__ = ["MakeOptimizer", "MakeSchedule", "NamedParameter", "decay_groups", "optimizer_factory", "schedule_factory"]
