"""What a step adds up to over all ranks: totals, weights and sums by name, in one all-reduce of one float64 vector.

Refuses ranks that do not bring the same: other terms or sums, or another way through what their collectives pair.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.errors import TrainingError, explain
from disttrain.objective import Loss
from disttrain.strategy.contract import StepSums, World
from disttrain.strategy.trail import Trail, other_trails

_ROOM = 64
"""Numbers in the step's one all-reduce, whatever the objective returns: enough for most, and no slower than one."""


class Ledger:
    """Adds up one rank's real micro-batches, then all ranks' by name, in one all-reduce of one float64 vector."""

    def __init__(self, world: World) -> None:
        self._device = world.device
        self._counts = world.mesh.counts
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, *, real: bool) -> None:
        for into, values in ((self._totals, loss.totals), (self._weights, loss.weights), (self._sums, loss.sums)):
            for name, value in values.items():
                kept = torch.as_tensor(value, dtype=torch.float64).detach()
                kept = kept if real and self._counts else torch.zeros_like(kept)
                into[name] = into[name] + kept if name in into else kept

    def reduce(self, flags: Sequence[float] = (), *, divided: bool = False, trail: Trail | None = None) -> StepSums:
        """Collective: all ranks' sums, by name.

        Raises TrainingError on every rank where their names differ, or their trails.
        """
        trail = trail or Trail()
        totals, weights, sums = (dict(sorted(group.items())) for group in (self._totals, self._weights, self._sums))
        layout = Layout(len(flags), (*totals,), (*weights,), tuple((name, (*sums[name].shape,)) for name in sums))
        values = [*totals.values(), *weights.values(), *sums.values()]
        numbers = iter(_add_up(layout, trail, flags, values, self._device))
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


def _add_up(
    layout: Layout, trail: Trail, flags: Sequence[float], values: Sequence[Tensor], device: torch.device
) -> list[float]:
    """Every rank's flags and values added up, flat, in one all-reduce of `_ROOM` numbers; what does not fit takes a
    second. Ranks of other layouts meet in it too, and raise TrainingError together.

    The first two numbers are a digest d of the layout and of the rank's trail, and its square: n * sum(d^2) = (sum d)^2
    only where all n agree (Cauchy-Schwarz). 20 bits keep both sums exact in float64 for up to 8192 ranks.
    """
    size = dist.get_world_size()
    digest = zlib.crc32(repr(layout).encode(), trail.digest) >> 12 if size > 1 else 0
    head = torch.tensor([digest, digest**2, *flags], dtype=torch.float64, device=device)
    flat = torch.cat([head, *(value.to(device).reshape(-1) for value in values)])
    count = flat.numel()
    if size == 1:  # a collective of one rank adds nothing, and takes gloo's thread 40 microseconds
        alone: list[float] = flat.tolist()
        return alone[2:]
    vector = torch.cat([flat[:_ROOM], flat.new_zeros(max(0, _ROOM - count))])
    dist.all_reduce(vector)
    numbers: list[float] = vector.tolist()
    if size * int(numbers[1]) != int(numbers[0]) ** 2:
        _refuse_others(layout, trail)
    if count > _ROOM:
        rest = flat[_ROOM:]
        dist.all_reduce(rest)
        numbers += rest.tolist()
    return numbers[2:count]


def _refuse_others(layout: Layout, trail: Trail) -> None:
    """Collective: raise TrainingError on every rank for two that differ in what their numbers are, or in trail."""
    everyone: list[tuple[Layout, int, list[str]]] = [(layout, 0, [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (layout, trail.digest, sorted(trail.seen)))
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other[0] != first[0]:
            told = [
                ", ".join([*one.weights, *(f"{name} {list(shape)}" for name, shape in one.sums)])
                for one in (first[0], other[0])
            ]
            raise TrainingError(
                explain(
                    "The objective is to return the same terms and sums, of the same shapes, on every rank.",
                    f"{told[0]} on rank 0, and {told[1]} on rank {rank}",
                    "return every term and sum for every batch, with zeros where there is nothing to add",
                )
            )
        if other[1] != first[1]:
            raise TrainingError(other_trails(first[2], rank, other[2]))
