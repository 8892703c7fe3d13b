"""Strategies: how a model is spread over the ranks. Siblings behind one contract. Enters: the engine, and plug-ins.

An author of a strategy finds here all that a strategy is written with, beside torch: the contract and the types in it,
the step's arithmetic, and how models are built, stepped and cut into boxes. What it is chosen and configured by,
`StrategyEntry` and `StrategyOptions`, is in `disttrain.config`, which imports no torch.
"""

from disttrain.checkpoint import Box, Shard, full_shard
from disttrain.config.schema import MemoryConfig, PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.objective import Context, Objective
from disttrain.optim.named import NamedParameter
from disttrain.runtime import Device, Group, Mesh, MeshSizes
from disttrain.strategy.canonical_boxes import copy_part, full_tensors, local_shard, replicated_shards, sharded_shards
from disttrain.strategy.construction import build_on_host, check_same_everywhere, equip, name_parameters
from disttrain.strategy.contract import (
    AbstractStrategy,
    Ingredients,
    ObjectiveCall,
    Prepared,
    StepOutcome,
    StepSums,
    World,
    reject_axes,
)
from disttrain.strategy.registry import strategy_class
from disttrain.strategy.step.arithmetic import Gradients, reject_non_finite, run_micro_batches
from disttrain.strategy.step.update import torch_step

__all__ = [
    "AbstractStrategy",
    "Box",
    "Context",
    "Device",
    "Gradients",
    "Group",
    "Ingredients",
    "MemoryConfig",
    "Mesh",
    "MeshSizes",
    "MicroBatch",
    "NamedParameter",
    "Objective",
    "ObjectiveCall",
    "PrecisionConfig",
    "Prepared",
    "Shard",
    "StepOutcome",
    "StepSums",
    "World",
    "build_on_host",
    "check_same_everywhere",
    "copy_part",
    "equip",
    "full_shard",
    "full_tensors",
    "local_shard",
    "name_parameters",
    "reject_axes",
    "reject_non_finite",
    "replicated_shards",
    "run_micro_batches",
    "sharded_shards",
    "strategy_class",
    "torch_step",
]
