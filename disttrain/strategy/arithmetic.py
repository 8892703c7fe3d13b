"""The step's arithmetic, once, for every strategy: exact sums over ranks and micro-batches, no averages of averages.

Gradients are those of `sum of the items' losses`, divided by the step's weight once, at the step. Where the loss has
several terms each has its own weight, so the weights are agreed on before the first backward instead.
Refuses losses that are not finite, before they can reach a weight.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.objective import Context, Loss, Objective
from disttrain.runtime.seeds import derive_seed, seed_torch
from disttrain.strategy.contract import Prepared, StepSums, World

Call = Callable[[Objective, Any, Context], Loss]
Backward = Callable[[Tensor], None]
Last = Callable[[bool], AbstractContextManager[Any]]

_ROOM = 64
"""Numbers in the step's one all-reduce, whatever the objective returns: enough for most, and no slower than one."""


def run_micro_batches(
    world: World,
    prepared: Prepared,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    flags: Sequence[float],
    *,
    call: Call,
    backward: Backward = Tensor.backward,
    communicating: Last = lambda last: nullcontext(),
) -> StepSums:
    """The plain loop. `call` runs the forward, `communicating(last)` surrounds forward and backward of each."""
    denominators = _agree_on_weights(world, micro_batches, objective)
    ledger = Ledger(world.device)
    for place, micro in enumerate(micro_batches):
        context = seed_micro_batch(world, prepared, micro)
        with communicating(place == len(micro_batches) - 1), _replay(prepared, micro.real):
            with world.computing():
                loss = call(objective, micro.batch, context)
            total = _one_total(loss, denominators)
            if not total.requires_grad:
                raise TrainingError(
                    explain(
                        "The objective's total is to depend on a trainable parameter.",
                        "a total without a gradient",
                        "check that the model has trainable parameters and that the objective does not detach",
                    )
                )
            backward(total if micro.real else total * 0.0)
        ledger.add(loss, real=micro.real)
    prepared.accumulations += 1
    sums = ledger.reduce(flags, divided=denominators is not None)
    if not all(math.isfinite(number) for number in (*sums.totals.values(), *sums.weights.values())):
        refuse_non_finite(f"totals {dict(sums.totals)} over weights {dict(sums.weights)}")
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
    seed_torch(key, world.device)
    np.random.seed(key % 2**32)  # as LayerDrop draws; 6 microseconds measured, with Python's
    random.seed(key)
    return Context(
        step=prepared.updates,
        training=training,
        micro_batch=micro.index,
        make_generator=lambda: torch.Generator(world.device).manual_seed(derive_seed(key, "context")),
        group=dist.group.WORLD,
    )


def _agree_on_weights(
    world: World, micro_batches: Sequence[MicroBatch], objective: Objective
) -> Mapping[str, float] | None:
    """Each term's weight over the whole step, where several terms need them before the first backward."""
    if not objective.has_weigh:
        return None
    if len(objective.weigh(micro_batches[0].batch)) == 1:
        return None
    ledger = Ledger(world.device)
    for micro in micro_batches:
        ledger.add(Loss({}, objective.weigh(micro.batch)), real=micro.real)
    return ledger.reduce(divided=True).weights


def _one_total(loss: Loss, denominators: Mapping[str, float] | None) -> Tensor:
    """What to back-propagate: the sum of the terms, each over its weight where that is known."""
    if denominators is None:
        return next(iter(loss.totals.values()))
    parts = [total / denominators[term] if denominators[term] else total * 0.0 for term, total in loss.totals.items()]
    return torch.stack([part.reshape(()) for part in parts]).sum()


@contextmanager
def _replay(prepared: Prepared, real: bool) -> Iterator[None]:
    """A replayed micro-batch keeps collectives aligned and leaves no trace: buffers are put back."""
    if real:
        yield
        return
    modules = [module for module in (prepared.model, prepared.objective) if module is not None]
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)


class Ledger:
    """Adds up one rank's real micro-batches, then all ranks' by name, in one all-reduce of one float64 vector."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, *, real: bool) -> None:
        for into, values in ((self._totals, loss.totals), (self._weights, loss.weights), (self._sums, loss.sums)):
            for name, value in values.items():
                kept = (
                    value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                ).double()
                kept = kept if real else torch.zeros_like(kept)
                into[name] = into[name] + kept if name in into else kept

    def reduce(self, flags: Sequence[float] = (), *, divided: bool = False) -> StepSums:
        """Collective: all ranks' sums, by name. Raises TrainingError on every rank where their names differ."""
        totals, weights, sums = (dict(sorted(group.items())) for group in (self._totals, self._weights, self._sums))
        layout = Layout(len(flags), (*totals,), (*weights,), tuple((name, (*sums[name].shape,)) for name in sums))
        numbers = iter(_add_up(layout, flags, [*totals.values(), *weights.values(), *sums.values()], self._device))
        raised = tuple(next(numbers) for _ in flags)
        total = {name: next(numbers) for name in totals}
        weight = {name: next(numbers) for name in weights}
        own = {
            name: torch.tensor([next(numbers) for _ in range(value.numel())], dtype=torch.float64).reshape(value.shape)
            for name, value in sums.items()
        }
        return StepSums(total, weight, own, raised, 1.0 if divided else next(iter(weight.values())))


class Layout(NamedTuple):
    """What a rank's numbers are, in their order: flags, totals and weights by term, sums by name and shape."""

    flags: int
    totals: tuple[str, ...]
    weights: tuple[str, ...]
    sums: tuple[tuple[str, tuple[int, ...]], ...]


def _add_up(layout: Layout, flags: Sequence[float], values: Sequence[Tensor], device: torch.device) -> list[float]:
    """Every rank's flags and values added up, flat, in one all-reduce of `_ROOM` numbers; what does not fit takes a
    second. Ranks of other layouts meet in it too, and raise TrainingError together.

    The first two numbers are a digest d of the layout and its square: n * sum(d^2) = (sum d)^2 only where all n agree
    (Cauchy-Schwarz). 20 bits keep both sums exact in float64 for up to 8192 ranks.
    """
    digest = zlib.crc32(repr(layout).encode()) >> 12
    head = torch.tensor([digest, digest**2, *flags], dtype=torch.float64, device=device)
    flat = torch.cat([head, *(value.to(device).reshape(-1) for value in values)])
    sent = min(flat.numel(), _ROOM)
    vector = torch.cat([flat[:sent], flat.new_zeros(_ROOM - sent)])
    dist.all_reduce(vector)
    numbers: list[float] = vector.tolist()
    if dist.get_world_size() * int(numbers[1]) != int(numbers[0]) ** 2:
        _refuse_other_layouts(layout)
    if flat.numel() > _ROOM:
        rest = flat[_ROOM:]
        dist.all_reduce(rest)
        numbers += rest.tolist()
    return numbers[2 : flat.numel()]


def _refuse_other_layouts(layout: Layout) -> None:
    """Collective: raise TrainingError on every rank where two ranks' numbers differ in name or shape."""
    layouts: list[Layout] = [layout] * dist.get_world_size()
    dist.all_gather_object(layouts, layout)
    for rank, other in enumerate(layouts):
        if other != layouts[0]:
            told = [
                ", ".join([*one.weights, *(f"{name} {list(shape)}" for name, shape in one.sums)])
                for one in (layouts[0], other)
            ]
            raise TrainingError(
                explain(
                    "The objective is to return the same terms and sums, of the same shapes, on every rank.",
                    f"{told[0]} on rank 0, and {told[1]} on rank {rank}",
                    "return every term and sum for every batch, with zeros where there is nothing to add",
                )
            )


def refuse_non_finite(found: str) -> None:
    """Raise TrainingError on every rank: the sums are those of all ranks, so all see the same."""
    raise TrainingError(
        explain(
            "The loss and its gradient are to be finite; the weights have not been changed by this step.",
            found,
            "look at this step's samples, lower the learning rate, clip gradients (optim.clip_norm) or use fp32",
        )
    )


class Gradients:
    """Local gradients of a step that torch optimizers then take; shared by none, ddp and fsdp."""

    def __init__(self, prepared: Prepared) -> None:
        self._parameters = [named.parameter for named in prepared.named]
        for named in prepared.named:
            parameter = named.parameter
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.layout != torch.strided:
                raise ConfigError(
                    explain(
                        "Gradients are scaled, measured and clipped as dense tensors.",
                        f"a sparse gradient of {named.name!r} of {prepared.name!r}",
                        "build its nn.Embedding with sparse=False",
                    )
                )
        self.locals = [_local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]

    def square(self, chosen: Sequence[Tensor] | None = None) -> Tensor:
        """Sum of squares of the local gradients (or of those chosen), a 0-d tensor, in at least float32... float64."""
        gradients = [gradient for gradient in (self.locals if chosen is None else chosen) if gradient.numel()]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.locals[0].device if self.locals else None)
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    def scale(self, factor: float) -> None:
        """Multiply all local gradients in place."""
        if factor != 1.0 and self.locals:
            torch._foreach_mul_(self.locals, factor)


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
