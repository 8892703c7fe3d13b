"""The step's arithmetic, once, for every strategy: exact sums over ranks and micro-batches, no averages of averages.

Gradients are those of `sum of the items' losses`, divided by the step's weight once, at the step. Where the loss has
several terms each has its own weight, so the weights are agreed on before the first backward instead. Under fp16 losses
are scaled (`LossScale`), and gradients are divided by that too.
Refuses losses that are not finite, before they can reach a weight.
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
    """The plain loop. The forward runs `through` a wrapper of `ObjectiveCall`, or else the objective on the model;
    `communicating(last)` surrounds a micro-batch's forward and backward, `checked()` its forward; `add_up` is called
    with the step's sums before the last backward, and what it returns after it."""
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
            if not total.requires_grad:
                raise TrainingError(
                    explain(
                        "The objective's total is to depend on a trainable parameter.",
                        "a total without a gradient",
                        "check that the model has trainable parameters and that the objective does not detach",
                    )
                )
            collector.add(loss, real=micro.real)
            if place == len(micro_batches) - 1:  # they are added up while this backward runs
                added_up = collector.start(flags, divided=denominators is not None, calls=prepared.calls, add_up=add_up)
            backward(total if micro.real else total * 0.0)
    prepared.accumulations += 1
    sums = added_up()
    if factor is not None:
        sums = replace(sums, denominator=sums.denominator * factor, scaled=True)
    if not all(map(math.isfinite, (*sums.totals.values(), *sums.weights.values()))):
        reject_non_finite(f"totals {dict(sums.totals)} over weights {dict(sums.weights)}")
    if min(sums.weights.values()) < 0.0:
        raise TrainingError(
            explain(
                "A step's weights are numbers of samples or tokens, added up over ranks and micro-batches.",
                f"{dict(sums.weights)}",
                "let the objective return weights that are not negative",
            )
        )
    return sums


def seed_micro_batch(world: World, prepared: Prepared, micro: MicroBatch, *, training: bool = True) -> Context:
    """Set the generators of the CPU and the device, numpy's and Python's, from (seed, step, index of the micro-batch):
    dropout is then equal at any world size. A step's second accumulation draws anew. Local."""
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
    """Each term's weight over the whole step, where several terms need them before the first backward.

    A scaled loss of one term learns its weight too, in a step's first accumulation: all of a step's have one scale.
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
    """What to back-propagate: the sum of the terms, each over its weight where that is known, times the scale's
    `factor` where there is one. A total in fp16 has no room for a scale."""
    if factor is not None:
        return _one_total(loss, denominators, None).float() * factor
    if denominators is None:
        return next(iter(loss.totals.values()))
    parts = [total / denominators[term] if denominators[term] else total * 0.0 for term, total in loss.totals.items()]
    return torch.stack([part.reshape(()) for part in parts]).sum()


@contextmanager
def _replay(prepared: Prepared) -> Iterator[None]:
    """A replayed micro-batch keeps collectives aligned and leaves no trace: buffers are put back.

    Those of synchronized batch norms follow the other ranks' micro-batches of this round, as everywhere.
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
    """Gradients of an accumulation before, which are added up over ranks already, stand aside meanwhile.

    As copies: their own memory may be where the next ones are added up. Where that fails they are all there is.
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
    """Collective: each becomes the sum over ranks, in its own memory, however that is laid out.

    All travel in one vector of the widest type, which `add_up` adds up in place.
    """
    held = list(filter(Tensor.numel, tensors))  # torch loses the shape of an empty one
    if not held:
        return
    flat = flatten(held)
    add_up(flat)
    copy_each(held, unflatten(flat, held))


def reject_non_finite(found: str) -> None:
    """Raise TrainingError on every rank: the sums are those of all ranks, so all see the same."""
    raise TrainingError(
        explain(
            "The loss and its gradient are to be finite; the weights have not been changed by this step.",
            found,
            "look at this step's samples, lower the learning rate, clip gradients (optim.clip_norm) or use fp32",
        )
    )


class Gradients:
    """Local gradients of a step that torch optimizers then take; shared by none, ddp and fsdp.

    `held` are as the parameters hold them and `locals` this rank's parts, which is the same where they are `whole`;
    `dtype` is None where there are several. Within `torch.no_grad`: with a graph to keep, `to_local` takes 12
    microseconds instead of a third of one.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._parameters = prepared.parameters
        gradients: list[Any] = [parameter.grad for parameter in self._parameters]
        if type(None) in set(map(type, gradients)):
            for place, parameter in enumerate(self._parameters):
                if gradients[place] is None:
                    gradients[place] = parameter.grad = torch.zeros_like(parameter)
        kinds = set(map(_KIND, gradients))  # three traits of hundreds of tensors without a loop in Python
        if any(sparse for _, _, sparse in kinds):
            _reject_sparse(prepared)
        self.dtype = next(iter(kinds))[1] if len(kinds) == 1 else None
        self.whole = all(kind is Tensor for kind, _, _ in kinds)
        self.held = gradients
        self.locals: list[Any] = gradients if self.whole else [local_part(gradient) for gradient in gradients]

    def drop(self, *, keep: bool) -> None:
        """Forget them, as `zero_grad(set_to_none=True)` does with more ado; or `keep` their memory, as zeros."""
        if keep:
            zero_each(self.locals)
            return
        for parameter in self._parameters:
            parameter.grad = None

    def square(self, chosen: Sequence[Tensor] | None = None) -> Tensor:
        """Sum of squares of the local gradients (or of those chosen), a 0-d tensor, in at least float32... float64."""
        gradients = list(filter(Tensor.numel, self.locals if chosen is None else chosen))
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.locals[0].device if self.locals else None)
        # bf16 gradients would get norms of 8 bits; wider ones keep their own type, bit for bit.
        wide = torch.float32 if gradients[0].dtype == torch.bfloat16 else None
        norms = torch.stack(norm_each(gradients, wide)).double()
        return norms.dot(norms)

    def scale(self, factor: float) -> None:
        """Multiply all local gradients in place."""
        if factor == 1.0 or not self.locals:
            return
        if self.locals[0].device.type == "cpu" and self.dtype in (torch.float32, torch.float64):
            # On a CPU a number is made a tensor for every gradient anew.
            multiply_each(self.locals, torch.tensor(factor, dtype=self.dtype))
        else:
            multiply_each(self.locals, factor)


_KIND = attrgetter("__class__", "dtype", "is_sparse")


def _reject_sparse(prepared: Prepared) -> None:
    named = next(one for one in prepared.named if one.parameter.grad is not None and one.parameter.grad.is_sparse)
    raise ConfigError(
        explain(
            "Gradients are scaled, measured and clipped as dense tensors.",
            f"a sparse gradient of {named.name!r} of {prepared.name!r}",
            "build its nn.Embedding with sparse=False",
        )
    )
