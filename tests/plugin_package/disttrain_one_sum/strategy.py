"""The `one_sum` strategy: every rank holds everything, and `step` sums gradients by flat all-reduces.

This is DDP without hooks. Nothing wraps the model or runs during a backward, so both are unrestricted,
and ranks may use different parameters. The cost is that communication does not overlap with computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.strategy import (
    AbstractStrategy,
    Device,
    Ingredients,
    MeshSizes,
    MicroBatch,
    Objective,
    PrecisionConfig,
    Prepared,
    Shard,
    StepOutcome,
    StepSums,
    build_on_host,
    equip,
    full_tensors,
    name_parameters,
    reject_axes,
    replicated_shards,
    run_micro_batches,
    torch_step,
)


class OneSum(AbstractStrategy):
    """Replicas, with one sum of their gradients per step."""

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        reject_axes("one_sum", sizes, "tensor")

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
        gradients = []
        for named in prepared.named:
            if named.parameter.grad is None:  # this rank did not use the parameter; another rank may have
                named.parameter.grad = torch.zeros_like(named.parameter)
            gradients.append(named.parameter.grad)
        for bucket in buckets(gradients, self.options.bucket_mb * 2**20):
            add_up(bucket)
        return torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm)

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        return replicated_shards(prepared, stored, replica=(self.world.group.rank, self.world.group.size))

    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        return full_tensors(prepared.model)


def buckets(gradients: Sequence[Tensor], most_bytes: float) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype with at most `most_bytes` together, or one larger tensor alone."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = sum(one.nbytes for one in bucket) + gradient.nbytes
        if bucket and (size > most_bytes or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def add_up(bucket: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks. Collective."""
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat)
    for gradient, added in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(added.view_as(gradient))
