"""Implements strategy `ddp`: every rank holds the full model, and DistributedDataParallel adds gradients up.

DDP wraps the call of the objective, not the model. An objective may then call the model several times, or by another
method than `forward`, within the one forward per backward that DDP allows. A small model is not wrapped: its gradients
travel with the step's sums, in one all-reduce.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.checkpoint import Shard
from disttrain.config.schema import PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.objective import Objective
from disttrain.runtime import Device, MeshSizes
from disttrain.strategy.canonical_boxes import full_tensors, replicated_shards
from disttrain.strategy.construction import build_on_host, equip, name_parameters
from disttrain.strategy.contract import (
    DTYPES,
    AbstractStrategy,
    Ingredients,
    ObjectiveCall,
    Prepared,
    StepOutcome,
    StepSums,
    World,
    reject_axes,
)
from disttrain.strategy.step.arithmetic import Gradients, add_up_together, earlier_apart, run_micro_batches
from disttrain.strategy.step.update import torch_step

# Batch statistics belong to each rank, so no rank's buffers overwrite another's. torch 2.13 renamed the option.
_LEAVE_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


_SMALL = 2**18
"""Bytes of gradients up to which one all-reduce in float64 is faster than two (docs/measurements/speed.md)."""


class DDP(AbstractStrategy):
    """Reduces gradients once per accumulation, during the last micro-batch's backward or after it."""

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """Reject a mesh with a tensor axis. On the other axes every rank is a replica."""
        reject_axes("ddp", sizes, "tensor")

    def __init__(self, options: Any, world: World) -> None:
        super().__init__(options, world)
        self._accumulates: dict[str, bool] = {}

    def prepare(self, ingredients: Ingredients) -> Prepared:
        model = build_on_host(self.world, ingredients).to(self.world.device)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        equip(prepared, ingredients, name_parameters(model, ingredients.objective))
        if prepared.optimizer is not None and not self._is_small(prepared):
            prepared.wrapped = DistributedDataParallel(
                ObjectiveCall(model, ingredients.objective),
                **_LEAVE_BUFFERS,
                bucket_cap_mb=self.options.bucket_mb,
                find_unused_parameters=self.options.find_unused,
                gradient_as_bucket_view=True,
            )
            if self._reduced_apart:
                # DDP wants a hook without annotations, or with its own that are no texts.
                hook = lambda dtype, bucket: add_up_in(dtype, bucket)  # noqa: E731
                prepared.wrapped.register_comm_hook(DTYPES[self.world.precision.reduce], hook)
        return prepared

    def _is_small(self, prepared: Prepared) -> bool:
        """Whether the gradients are small, fit in a bucket, and are all added up in their dtype, fp32 or fp64."""
        parameters = prepared.parameters
        return (
            sum(one.nbytes for one in parameters) <= min(_SMALL, self.options.bucket_mb * 2**20)
            and self.world.precision.reduce in ("fp32", "fp64")
            and {one.dtype for one in parameters} == {DTYPES[self.world.precision.reduce]}
        )

    @property
    def _reduced_apart(self) -> bool:
        """Whether a hook adds gradients up instead of DDP, in another dtype than that of the parameters."""
        return self.world.precision.reduce != self.world.precision.master

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        step = self.world, prepared, micro_batches, objective, flags
        earlier = prepared.parameters if prepared.accumulations else ()
        ddp: DistributedDataParallel | None = prepared.wrapped
        if ddp is None:
            with earlier_apart(earlier):
                return run_micro_batches(*step, add_up=lambda sums: partial(self._add_up, prepared, sums))

        def communicating(last: bool) -> AbstractContextManager[Any]:
            return nullcontext() if last else ddp.no_sync()

        self._accumulates[prepared.name] = len(micro_batches) > 1
        # DDP averages earlier gradients, which are equal on all ranks and so do not change. A sum would multiply them.
        with earlier_apart(earlier if self._reduced_apart else ()):
            return run_micro_batches(*step, through=ddp, communicating=communicating)

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        if prepared.wrapped is None:
            return torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm)
        _lay_out(prepared.parameters)
        # DDP's reduction divides by the world size, and the step needs the sum.
        factor = 1.0 if self._reduced_apart else float(self.world.group.size)
        # Several micro-batches add up in the buckets. New gradients would need more memory until the last backward.
        keep = self._accumulates.get(prepared.name, False)
        return torch_step(prepared, sums, clip_norm=clip_norm, want_norm=want_norm, factor=factor, keep=keep)

    @torch.no_grad()
    def _add_up(self, prepared: Prepared, sums: Tensor) -> None:
        """Add up gradients and the step's `sums` over all ranks, in one all-reduce of float64. Collective."""
        add_up_together([sums, *Gradients(prepared).held], lambda vector: self.world.group.add_up(vector)())

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        return replicated_shards(prepared, stored, replica=(self.world.group.rank, self.world.group.size))

    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        return full_tensors(prepared.model)


def _lay_out(parameters: Sequence[nn.Parameter]) -> None:
    """Give gradients the memory layout of their parameters.

    Buckets keep the layout that was wrapped, and a model may change its layout (channels_last) after it is prepared.
    torch's fused optimizers require equal layouts.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    gradients: list[Any] = [parameter.grad for parameter in held]
    if list(map(Tensor.stride, gradients)) != list(map(Tensor.stride, held)):
        for parameter, gradient in zip(held, gradients, strict=True):
            if gradient.stride() != parameter.stride() and not gradient.is_sparse:  # rejected later, with a message
                parameter.grad = torch.empty_like(parameter).copy_(gradient)


def add_up_in(dtype: torch.dtype, bucket: Any) -> torch.futures.Future[Tensor]:
    """Add up a bucket of gradients over all ranks in `dtype`, as a communication hook of DDP. Collective."""
    own = bucket.buffer()
    added: torch.futures.Future[list[Tensor]] = dist.all_reduce(own.to(dtype), async_op=True).get_future()
    return added.then(lambda future: own.copy_(future.value()[0]))
