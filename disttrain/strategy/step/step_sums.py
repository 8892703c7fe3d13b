"""What a step adds up to over all ranks: totals, weights and sums by name, in one all-reduce of one float64 vector.

Refuses ranks that do not bring the same: other terms or sums, or another way through what their collectives pair.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.errors import TrainingError, explain
from disttrain.objective import Loss, Number
from disttrain.strategy.call_agreement import Trail, other_trails
from disttrain.strategy.contract import StepSums, World

AddUp = Callable[[Tensor], Callable[[], Any]]
"""Adds a vector up over all ranks, in place, from now on or when what comes back is called. Collective."""

_ROOM = 64
"""Numbers in the step's one all-reduce, whatever the objective returns: enough for most, and no slower than one."""


class Ledger:
    """Adds up one rank's real micro-batches, then all ranks' by name, in one all-reduce of one float64 vector."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._totals: dict[str, Number] = {}
        self._weights: dict[str, Number] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, *, real: bool) -> None:
        counts = real and self._world.mesh.counts
        for into, values in ((self._totals, loss.totals), (self._weights, loss.weights)):
            for name, value in values.items():
                kept = _number(value) if counts else 0.0
                into[name] = into[name] + kept if name in into else kept
        for name, tensor in loss.sums.items():
            wide = tensor.detach().double() if counts else torch.zeros_like(tensor, dtype=torch.float64)
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    def reduce(self, flags: Sequence[float] = (), *, divided: bool = False, trail: Trail | None = None) -> StepSums:
        """Collective: all ranks' sums, by name.

        Raises TrainingError on every rank where their names differ, or their trails.
        """
        return self.start(flags, divided=divided, trail=trail)()

    def start(
        self,
        flags: Sequence[float] = (),
        *,
        divided: bool = False,
        trail: Trail | None = None,
        add_up: AddUp | None = None,
    ) -> Callable[[], StepSums]:
        """Collective: begin to add up what was brought so far, or leave when to `add_up`. What comes back waits for it,
        gives what `reduce` gives and raises what it raises; all ranks call that too."""
        if self._world.group.size == 1 and self._world.device.type == "cpu":  # all is here, and read
            alone = {term: float(value) for term, value in self._weights.items()}
            divisor = 1.0 if divided else next(iter(alone.values()))
            found = StepSums({t: float(v) for t, v in self._totals.items()}, alone, self._sums, tuple(flags), divisor)
            return lambda: found
        totals, weights, sums = sorted(self._totals), sorted(self._weights), dict(sorted(self._sums.items()))
        values: list[Number] = [*flags]
        values += [self._totals[term] for term in totals]
        values += [self._weights[term] for term in weights]
        shapes = tuple((name, (*value.shape,)) for name, value in sums.items())
        layout = Layout(len(flags), (*totals,), (*weights,), shapes)
        added = self._add_up(values, sums, layout, trail or Trail(), add_up)

        def read() -> StepSums:
            numbers = added()
            first = len(flags) + len(totals)
            total = dict(zip(totals, numbers[len(flags) : first], strict=True))
            weight = dict(zip(weights, numbers[first : len(values)], strict=True))
            own, at = {}, len(values)
            for name, value in sums.items():
                own[name] = torch.tensor(numbers[at : at + value.numel()], dtype=torch.float64).reshape(value.shape)
                at += value.numel()
            raised = tuple(numbers[: len(flags)])
            return StepSums(total, weight, own, raised, 1.0 if divided else next(iter(weight.values())))

        return read

    def _add_up(
        self, values: list[Number], sums: dict[str, Tensor], layout: Layout, trail: Trail, add_up: AddUp | None
    ) -> Callable[[], list[float]]:
        """Every rank's values and sums added up, flat, in one all-reduce of `_ROOM` numbers; the rest takes a second.
        Ranks of other layouts meet in it too, and raise TrainingError together.

        The first two numbers are a digest d of the layout and of the rank's trail, and its square: n * sum(d^2) =
        (sum d)^2 only where all n agree (Cauchy-Schwarz). 20 bits keep both sums exact in float64 for up to 8192 ranks.
        """
        size = self._world.group.size
        if size == 1:  # a collective of one rank adds nothing, and takes gloo's thread 40 microseconds
            return _fetch(_flat(values, sums, self._world.device))
        digest = zlib.crc32(_encoded(layout), trail.digest) >> 12
        count = 2 + len(values) + sum(map(Tensor.numel, sums.values()))
        flat = _flat([digest, digest**2, *values], sums, self._world.device, length=_ROOM)
        vector = flat if count <= _ROOM else flat[:_ROOM]
        fetch = _fetch if add_up is None else _read_after
        first = fetch(vector, (add_up or self._world.group.add_up)(vector))

        def read() -> list[float]:
            numbers = first()
            if size * int(numbers[1]) != int(numbers[0]) ** 2:
                _refuse_others(layout, trail)
            if count > _ROOM:
                rest = flat[_ROOM:]
                self._world.group.add_up(rest)()
                numbers += rest.tolist()
            return numbers[2:count]

        return read


def _read_after(vector: Tensor, wait: Callable[[], Any]) -> Callable[[], list[float]]:
    """Its numbers, once `wait` is through."""

    def read() -> list[float]:
        wait()
        found: list[float] = vector.tolist()
        return found

    return read


def _fetch(vector: Tensor, wait: Callable[[], Any] = lambda: None) -> Callable[[], list[float]]:
    """The same; a GPU begins to bring them at once, and what it is given meanwhile (a backward) is not waited for."""
    if vector.device.type != "cuda":
        return _read_after(vector, wait)
    stream, host = _beside(vector.device), torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(vector.device))
    with torch.cuda.stream(stream):
        wait()
        host.copy_(vector, non_blocking=True)
        copied = stream.record_event()
    vector.record_stream(stream)
    return _read_after(host, copied.synchronize)


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """A stream on which small things are copied while the device's own goes on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _number(value: Number) -> Number:
    """Without its graph, in float64; what lies on the host is read, what lies on a device is not waited for."""
    if not isinstance(value, Tensor):
        return float(value)
    found = value.detach()
    return float(found) if found.device.type == "cpu" else found.double()


def _flat(values: Sequence[Number], sums: Mapping[str, Tensor], device: torch.device, length: int = 0) -> Tensor:
    """One float64 vector on `device`, with zeros at its end where it would be shorter than `length`."""
    if any(isinstance(value, Tensor) for value in values):
        filled = [
            value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
            for value in values
        ]
        parts = [torch.stack([value.to(device, torch.float64) for value in filled])]
    else:
        numbers = np.zeros(len(values) if sums else max(length, len(values)))  # five times as fast as torch.tensor
        numbers[: len(values)] = values
        parts = [torch.from_numpy(numbers).to(device)]
    parts += [one.to(device).reshape(-1) for one in sums.values()]
    missing = length - sum(map(Tensor.numel, parts))
    if missing > 0:
        parts.append(parts[0].new_zeros(missing))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Layout(NamedTuple):
    """What a rank's numbers are, in their order: flags, totals and weights by term, sums by name and shape."""

    flags: int
    totals: tuple[str, ...]
    weights: tuple[str, ...]
    sums: tuple[tuple[str, tuple[int, ...]], ...]


@lru_cache(maxsize=64)
def _encoded(layout: Layout) -> bytes:
    return repr(layout).encode()


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
