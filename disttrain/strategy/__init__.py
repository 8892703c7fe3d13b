"""Distributes a model over ranks. Strategies implement one contract and do not import each other.

Authors of plug-in strategies import everything from here: the contract and its types, the arithmetic of a step, and the
functions that build models, step optimizers and describe tensors as boxes. `StrategyEntry` and `StrategyOptions`, by
which a config selects and configures a strategy, are in `disttrain.config`, which imports no torch.
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
