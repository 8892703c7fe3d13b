"""Runs the micro-batches of a step, for every strategy: exact sums over ranks and micro-batches, no mean of means.

Gradients are those of the sum of the items' losses, and are divided by the step's weight once, at the step. A loss of
several terms has a weight per term, so ranks add up the weights before the first backward instead. Under fp16 losses
are scaled (`LossScale`), and gradients are divided by the scale too. A loss that is not finite is rejected before it
can change a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.model.batch_norm import left_out, synchronized_norms
from disttrain.objective import Context, Loss, Objective
from disttrain.runtime.seeds import derive_seed, seed_all
from disttrain.strategy.contract import Prepared, StepSums, World
from disttrain.strategy.step.fused_adam import local_part
from disttrain.strategy.step.step_sums import AddUp, SumCollector
from disttrain.torch_internals import copy_each, flatten, multiply_each, norm_each, unflatten, zero_each

Wrapper = Callable[[Objective, Any, Context], tuple[Any, Any, Any]]
Backward = Callable[[Tensor], None]
Last = Callable[[bool], AbstractContextManager[Any]]
_NOTHING: AbstractContextManager[Any] = nullcontext()


def run_micro_batches(
    world: World,
    prepared: Prepared,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    flags: Sequence[float],
    *,
    through: Wrapper | None = None,
    backward: Backward = Tensor.backward,
    communicating: Last = lambda last: _NOTHING,
    checked: Callable[[], AbstractContextManager[Any]] = lambda: _NOTHING,
    add_up: AddUp | None = None,
) -> StepSums:
    """Run forward and backward of each micro-batch, and return the step's sums over all ranks. Collective.

    Args:
        world: the ranks and the settings.
        prepared: the model.
        micro_batches: this rank's micro-batches of the step, equally many on every rank.
        objective: computes totals, weights and sums of a micro-batch.
        flags: the engine's numbers, which are added up over ranks.
        through: calls the objective on the model: a wrapper of `ObjectiveCall`, for example.
        backward: back-propagates a total.
        communicating: returns the context of a micro-batch's forward and backward, given whether it is the last.
        checked: returns the context of a micro-batch's forward.
        add_up: receives the vector of the step's sums before the last backward. It returns a function to call after it.

    Raises TrainingError for a total without a gradient, for sums that are not finite, and for negative weights.
    """
    denominators = _agree_on_weights(world, prepared, micro_batches, objective)
    factor = prepared.loss_scale.factor(divided=denominators is not None) if world.scaled else None
    prepared.calls.restart()
    collector = SumCollector(world)
    for place, micro in enumerate(micro_batches):
        context = seed_micro_batch(world, prepared, micro)
        replay = _NOTHING if micro.real else _replay(prepared)
        with communicating(place == len(micro_batches) - 1), replay:
            with world.computing(), checked():
                if through is None:
                    loss = objective(prepared.model, micro.batch, context)
                else:
                    loss = Loss(*through(objective, micro.batch, context))
            total = _one_total(loss, denominators, factor)
            _check_total(total)
            collector.add(loss, real=micro.real)
            if place == len(micro_batches) - 1:  # sums are added up while this backward runs
                added_up = collector.start(flags, divided=denominators is not None, calls=prepared.calls, add_up=add_up)
            backward(total if micro.real else total * 0.0)
    prepared.accumulations += 1
    sums = added_up()
    if factor is not None:
        sums = replace(sums, denominator=sums.denominator * factor, scaled=True)
    _check_sums(sums)
    return sums


def _check_total(total: Tensor) -> None:
    if not total.requires_grad:
        raise TrainingError(
            explain(
                "Cannot train on the objective's total.",
                "it depends on no trainable parameter: it has no gradient",
                "check that the model has trainable parameters and that the objective does not detach",
            )
        )


def _check_sums(sums: StepSums) -> None:
    if not all(map(math.isfinite, (*sums.totals.values(), *sums.weights.values()))):
        reject_non_finite(f"totals {dict(sums.totals)} over weights {dict(sums.weights)}")
    if min(sums.weights.values()) < 0.0:
        raise TrainingError(
            explain(
                "Cannot divide by a step's weight, a number of samples or tokens.",
                f"a weight is negative: {dict(sums.weights)}",
                "return weights from the objective that are not negative",
            )
        )


def seed_micro_batch(world: World, prepared: Prepared, micro: MicroBatch, *, training: bool = True) -> Context:
    """Set the generators of the CPU, the device, numpy and Python from (seed, step, index of the micro-batch). Local.

    Dropout is then equal at any world size. A second accumulation before one step draws other numbers.
    """
    again = (prepared.accumulations,) if training and prepared.accumulations else ()
    key = derive_seed(world.seed, "step" if training else "eval", prepared.name, prepared.updates, micro.index, *again)
    seed_all(key, world.device)
    return Context(
        step=prepared.updates,
        training=training,
        micro_batch=micro.index,
        make_generator=lambda: torch.Generator(world.device).manual_seed(derive_seed(key, "context")),
        group=world.mesh.data_group,
    )


def _agree_on_weights(
    world: World, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective
) -> Mapping[str, float] | None:
    """Return each term's weight over the step, where a loss of several terms needs them before the first backward.

    A scaled loss of one term takes its weight in a step's first accumulation, so that all accumulations have one scale.
    """
    if not objective.has_weigh:
        return None
    alone = len(objective.weigh(micro_batches[0].batch)) == 1
    if alone and not (world.scaled and prepared.accumulations == 0):
        return None
    collector = SumCollector(world)
    for micro in micro_batches:
        collector.add(Loss({}, objective.weigh(micro.batch)), real=micro.real)
    weights = collector.reduce(divided=True).weights
    if not alone:
        return weights
    prepared.loss_scale.expect(next(iter(weights.values())))
    return None


def _one_total(loss: Loss, denominators: Mapping[str, float] | None, factor: float | None) -> Tensor:
    """Return the total to back-propagate: the sum of the terms, each divided by its weight where that is known.

    It is multiplied by the scale's `factor` in float32, since the product may overflow in fp16.
    """
    if factor is not None:
        return _one_total(loss, denominators, None).float() * factor
    if denominators is None:
        return next(iter(loss.totals.values()))
    parts = [total / denominators[term] if denominators[term] else total * 0.0 for term, total in loss.totals.items()]
    return torch.stack([part.reshape(()) for part in parts]).sum()


@contextmanager
def _replay(prepared: Prepared) -> Iterator[None]:
    """Surround a replayed micro-batch, which only keeps collectives aligned: restore the buffers afterwards.

    The buffers of synchronized batch norms are not restored. They follow the other ranks' micro-batches of this round.
    """
    modules = [module for module in (prepared.model, prepared.objective) if module is not None]
    norms = synchronized_norms(modules)
    shared = {id(buffer) for norm in norms for buffer in norm.buffers()}
    kept = [(one, one.clone()) for module in modules for one in module.buffers() if id(one) not in shared]
    with left_out(norms):
        yield
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)


@contextmanager
def earlier_apart(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep gradients of an earlier accumulation, which are already added up over ranks, out of this one.

    They are copied, because the next gradients may be added up in their memory. After an error they are restored.
    """
    earlier = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
        raise
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad.add_(gradient)


@torch.no_grad()
def add_up_together(tensors: Sequence[Tensor], add_up: Callable[[Tensor], Any]) -> None:
    """Replace each tensor by its sum over ranks, in place and with its memory layout. Collective.

    All travel in one vector of the widest dtype, which `add_up` adds up in place.
    """
    held = list(filter(Tensor.numel, tensors))  # torch loses the shape of an empty tensor
    if not held:
        return
    flat = flatten(held)
    add_up(flat)
    copy_each(held, unflatten(flat, held))


def reject_non_finite(problem: str) -> None:
    """Raise TrainingError on every rank. Call it with sums over all ranks, which are equal everywhere."""
    raise TrainingError(
        explain(
            "Cannot take this step: its loss or gradient is not finite. The weights are unchanged.",
            problem,
            "look at this step's samples, lower the learning rate, clip gradients (optim.clip_norm) or use fp32",
        )
    )


class Gradients:
    """The local gradients of a step, for strategies whose optimizer is torch's: none, ddp and fsdp.

    Build it within `torch.no_grad`: `to_local` then takes a third of a microsecond instead of 12.

    Attributes:
        held: the gradients as the parameters hold them. Missing gradients are zeros.
        locals: this rank's parts of them, the same tensors where no gradient is a DTensor.
        full: whether no gradient is a DTensor.
        dtype: their dtype, or None where there are several.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._parameters = prepared.parameters
        gradients: list[Any] = [parameter.grad for parameter in self._parameters]
        if type(None) in set(map(type, gradients)):
            for place, parameter in enumerate(self._parameters):
                if gradients[place] is None:
                    gradients[place] = parameter.grad = torch.zeros_like(parameter)
        kinds = set(map(_KIND, gradients))  # reads hundreds of tensors without a loop in Python
        if any(sparse for _, _, sparse in kinds):
            _reject_sparse(prepared)
        self.dtype = next(iter(kinds))[1] if len(kinds) == 1 else None
        self.full = all(kind is Tensor for kind, _, _ in kinds)
        self.held = gradients
        self.locals: list[Any] = gradients if self.full else [local_part(gradient) for gradient in gradients]

    def drop(self, *, keep: bool) -> None:
        """Remove the gradients, faster than `zero_grad(set_to_none=True)`. With `keep` set them to zero instead."""
        if keep:
            zero_each(self.locals)
            return
        for parameter in self._parameters:
            parameter.grad = None

    def square(self, chosen: Sequence[Tensor] | None = None) -> Tensor:
        """Return the sum of squares of the local gradients, or of those chosen, as a 0-d float64 tensor."""
        gradients = list(filter(Tensor.numel, self.locals if chosen is None else chosen))
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.locals[0].device if self.locals else None)
        # Norms of bf16 gradients would have 8 bits. Wider gradients keep their dtype and so their bits.
        wide = torch.float32 if gradients[0].dtype == torch.bfloat16 else None
        norms = torch.stack(norm_each(gradients, wide)).double()
        return norms.dot(norms)

    def scale(self, factor: float) -> None:
        """Multiply all local gradients in place."""
        if factor == 1.0 or not self.locals:
            return
        if self.locals[0].device.type == "cpu" and self.dtype in (torch.float32, torch.float64):
            # On a CPU a number would become a new tensor for every gradient.
            multiply_each(self.locals, torch.tensor(factor, dtype=self.dtype))
        else:
            multiply_each(self.locals, factor)


_KIND = attrgetter("__class__", "dtype", "is_sparse")


def _reject_sparse(prepared: Prepared) -> None:
    named = next(one for one in prepared.named if one.parameter.grad is not None and one.parameter.grad.is_sparse)
    raise ConfigError(
        explain(
            f"Cannot scale and clip the gradients of {prepared.name!r}, which must be dense tensors.",
            f"the gradient of {named.name!r} is sparse",
            "build its nn.Embedding with sparse=False",
        )
    )
