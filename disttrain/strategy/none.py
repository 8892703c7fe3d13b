"""Implements strategy `none`: one process and no wrapper. Every other strategy gives equal results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from disttrain.checkpoint import Shard
from disttrain.config.schema import PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, explain
from disttrain.objective import Objective
from disttrain.runtime import Device, MeshSizes
from disttrain.strategy.canonical_boxes import full_tensors, replicated_shards
from disttrain.strategy.construction import build_on_host, equip, name_parameters
from disttrain.strategy.contract import AbstractStrategy, Ingredients, Prepared, StepOutcome, StepSums
from disttrain.strategy.step.arithmetic import run_micro_batches
from disttrain.strategy.step.update import torch_step


class NoStrategy(AbstractStrategy):
    """Trains in one process. Several processes are rejected, since each would train a separate model."""

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """Reject several processes."""
        if sizes.world_size > 1:
            raise ConfigError(
                explain(
                    "Cannot use strategy none with several processes.",
                    f"there are {sizes.world_size} processes",
                    "set strategy.name to ddp, fsdp or deepspeed, or start one process",
                )
            )

    def prepare(self, ingredients: Ingredients) -> Prepared:
        model = build_on_host(self.world, ingredients).to(self.world.device)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        equip(prepared, ingredients, name_parameters(model, ingredients.objective))
        return prepared

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        return run_micro_batches(self.world, prepared, micro_batches, objective, flags)

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        return torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm)

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        return replicated_shards(prepared, stored, replica=(0, 1))

    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        return full_tensors(prepared.model)
