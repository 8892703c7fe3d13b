"""Adds up what a step computes over all ranks: totals, weights and sums by name, in one float64 vector.

The vector travels in one all-reduce. It starts with a digest, by which ranks verify that they add up the same values.
The objective's terms and sums must be equal on every rank, and so must the order of calls that collectives depend on.
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
from disttrain.strategy.call_order import CallSequence, explain_other_calls
from disttrain.strategy.contract import StepSums, World

AddUp = Callable[[Tensor], Callable[[], Any]]
"""Starts to add a vector up over all ranks in place. The function that it returns waits for the result. Collective."""

_LENGTH = 64
"""Numbers in the step's one all-reduce, whatever the objective returns. Most objectives need fewer. A shorter vector is
not faster."""


class SumCollector:
    """Adds up this rank's real micro-batches, then those of all ranks by name."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._totals: dict[str, Number] = {}
        self._weights: dict[str, Number] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, *, real: bool) -> None:
        """Add a micro-batch's loss. One that is not `real` adds zeros under the same names. Local."""
        counts = real and self._world.mesh.counts
        for into, values in ((self._totals, loss.totals), (self._weights, loss.weights)):
            for name, value in values.items():
                kept = _number(value) if counts else 0.0
                into[name] = into[name] + kept if name in into else kept
        for name, tensor in loss.sums.items():
            wide = tensor.detach().double() if counts else torch.zeros_like(tensor, dtype=torch.float64)
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    def reduce(
        self, flags: Sequence[float] = (), *, divided: bool = False, calls: CallSequence | None = None
    ) -> StepSums:
        """Return the sums over all ranks. Collective.

        Raises TrainingError on every rank where the names of sums or the calls differ between ranks.
        """
        return self.start(flags, divided=divided, calls=calls)()

    def start(
        self,
        flags: Sequence[float] = (),
        *,
        divided: bool = False,
        calls: CallSequence | None = None,
        add_up: AddUp | None = None,
    ) -> Callable[[], StepSums]:
        """Start to add up what was collected so far. Collective, and so is the function that this returns.

        Args:
            flags: the engine's numbers, which are added up too.
            divided: whether losses were divided by their weights before the backward.
            calls: the calls of this rank, which must equal those of the others.
            add_up: adds the vector up, at a time of its choice. The default starts at once.

        Returns:
            A function that waits for the sums. It returns and raises what `reduce` returns and raises.
        """
        if self._world.group.size == 1 and self._world.device.type == "cpu":  # nothing to add up, nothing to wait for
            alone = {term: float(value) for term, value in self._weights.items()}
            divisor = 1.0 if divided else next(iter(alone.values()))
            found = StepSums({t: float(v) for t, v in self._totals.items()}, alone, self._sums, tuple(flags), divisor)
            return lambda: found
        totals, weights, sums = sorted(self._totals), sorted(self._weights), dict(sorted(self._sums.items()))
        values: list[Number] = [*flags]
        values += [self._totals[term] for term in totals]
        values += [self._weights[term] for term in weights]
        shapes = tuple((name, (*value.shape,)) for name, value in sums.items())
        fields = VectorFields(len(flags), (*totals,), (*weights,), shapes)
        added = self._add_up(values, sums, fields, calls or CallSequence(), add_up)

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
        self,
        values: list[Number],
        sums: dict[str, Tensor],
        fields: VectorFields,
        calls: CallSequence,
        add_up: AddUp | None,
    ) -> Callable[[], list[float]]:
        """Add up values and sums, flat, in one all-reduce of `_LENGTH` numbers. Further numbers take a second one.

        Ranks with other fields join the same first all-reduce, and all raise TrainingError together. Its first two
        numbers are a digest d of the fields and calls, and d^2: n * sum(d^2) = (sum d)^2 holds only where all n ranks
        have the same d (Cauchy-Schwarz). With 20 bits both sums are exact in float64 for up to 8192 ranks.
        """
        size = self._world.group.size
        if size == 1:  # a collective of one rank changes nothing and takes 40 microseconds of gloo's thread
            return _fetch(_flat(values, sums, self._world.device))
        digest = zlib.crc32(_encoded(fields), calls.digest) >> 12
        count = 2 + len(values) + sum(map(Tensor.numel, sums.values()))
        flat = _flat([digest, digest**2, *values], sums, self._world.device, length=_LENGTH)
        vector = flat if count <= _LENGTH else flat[:_LENGTH]
        fetch = _fetch if add_up is None else _read_after
        first = fetch(vector, (add_up or self._world.group.add_up)(vector))

        def read() -> list[float]:
            numbers = first()
            if size * int(numbers[1]) != int(numbers[0]) ** 2:
                _reject_others(fields, calls)
            if count > _LENGTH:
                rest = flat[_LENGTH:]
                self._world.group.add_up(rest)()
                numbers += rest.tolist()
            return numbers[2:count]

        return read


def _read_after(vector: Tensor, wait: Callable[[], Any]) -> Callable[[], list[float]]:
    """Return a function that calls `wait`, then reads the vector."""

    def read() -> list[float]:
        wait()
        found: list[float] = vector.tolist()
        return found

    return read


def _fetch(vector: Tensor, wait: Callable[[], Any] = lambda: None) -> Callable[[], list[float]]:
    """Return a function that calls `wait`, then reads the vector.

    A GPU starts the copy to the host at once, on another stream. The copy does not wait for work that is queued later,
    such as a backward.
    """
    if vector.device.type != "cuda":
        return _read_after(vector, wait)
    stream, host = _copy_stream(vector.device), torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(vector.device))
    with torch.cuda.stream(stream):
        wait()
        host.copy_(vector, non_blocking=True)
        copied = stream.record_event()
    vector.record_stream(stream)
    return _read_after(host, copied.synchronize)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for small copies, which run while the device's main stream computes."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _number(value: Number) -> Number:
    """Return a value in float64 without its graph: a float from the host, a tensor from a device, without a wait."""
    if not isinstance(value, Tensor):
        return float(value)
    found = value.detach()
    return float(found) if found.device.type == "cpu" else found.double()


def _flat(values: Sequence[Number], sums: Mapping[str, Tensor], device: torch.device, length: int = 0) -> Tensor:
    """Return one float64 vector on `device`, padded with zeros to `length` where it is shorter."""
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


class VectorFields(NamedTuple):
    """The meaning of a rank's numbers, in their order: flags, totals and weights by term, sums by name and shape."""

    flags: int
    totals: tuple[str, ...]
    weights: tuple[str, ...]
    sums: tuple[tuple[str, tuple[int, ...]], ...]


@lru_cache(maxsize=64)
def _encoded(fields: VectorFields) -> bytes:
    return repr(fields).encode()


def _reject_others(fields: VectorFields, calls: CallSequence) -> None:
    """Raise TrainingError on every rank for the first rank that differs from rank 0, in fields or calls. Collective."""
    everyone: list[tuple[VectorFields, int, list[str]]] = [(fields, 0, [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (fields, calls.digest, sorted(calls.names)))
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other[0] != first[0]:
            named = [
                ", ".join([*one.weights, *(f"{name} {list(shape)}" for name, shape in one.sums)])
                for one in (first[0], other[0])
            ]
            raise TrainingError(
                explain(
                    "Cannot add up the objective's terms and sums: their names or shapes differ between ranks.",
                    f"{named[0]} on rank 0, and {named[1]} on rank {rank}",
                    "return every term and sum for every batch, with zeros where there is nothing to add",
                )
            )
        if other[1] != first[1]:
            raise TrainingError(explain_other_calls(first[2], rank, other[2]))
