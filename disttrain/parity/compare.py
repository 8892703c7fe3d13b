"""Compares two recorded runs: loss, gradient norm and every tensor at every step, against stated bounds.

Entries whose gradient never rises above its own rounding error are reported separately, because an optimizer such as
AdamW turns that rounding error into steps. Holds one tensor of each run in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.parity.recorded import Recorded

RISES = 10.0
"""A gradient entry counts as determined if, at some step, its rounding error is below a tenth of its value."""

_EPSILON = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Bounds:
    """The largest relative differences that count as equal. `parameters` applies to the 2-norm of a tensor."""

    loss: float
    norm: float
    parameters: float


BOUNDS: Mapping[str, Bounds] = {"fp32": Bounds(1e-5, 1e-5, 1e-4), "fp64": Bounds(1e-9, 1e-9, 1e-9)}
"""By precision. Within these bounds only the order of sums differs."""


def bounds_for(compute: str, master: str) -> Bounds:
    """Returns the bounds for a run that computes in `compute` with master weights in `master`.

    For bf16 and fp16 the loss is bounded by the dtype's epsilon, because it averages items that were each rounded once.
    Norm and parameters are bounded by four times epsilon, because each layer rounds again if sums have another order.
    """
    if compute == "fp64":
        return BOUNDS["fp64"]
    epsilon = max(_EPSILON.get(compute, 0.0), _EPSILON.get(master, 0.0))
    return Bounds(epsilon, 4 * epsilon, 4 * epsilon) if epsilon else BOUNDS["fp32"]


@dataclass(frozen=True)
class TensorDifference:
    """`relative` is norm(a - b) / norm(b) at `step`. Of the tensor's `entries`, `undetermined` were left out of it."""

    name: str
    step: int
    relative: float
    undetermined: int = 0
    entries: int = 0


@dataclass(frozen=True)
class Difference:
    """The largest relative differences over the steps. `first_step` is the first step beyond a bound, in `first_in`.

    Step 0 stands for the initial weights, which must be bit-equal. `tensors` lists the tensors beyond the bound at some
    step, worst first. `undetermined` lists the tensors within the bound once entries without a gradient are left out.
    `missing` lists names that only one of the runs has.
    """

    loss: float
    norm: float
    parameters: float
    first_step: int | None = None
    first_in: str | None = None
    tensors: tuple[TensorDifference, ...] = ()
    undetermined: tuple[TensorDifference, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether everything is within the bounds."""
        return self.first_step is None


def relative(found: float, expected: float) -> float:
    """Returns the relative difference of two numbers: infinite if only one of them is finite."""
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return 0.0
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def tensor_relative(found: Tensor, expected: Tensor, determined: Tensor | None = None) -> float:
    """Returns norm(found - expected) / norm(expected) in float64. The difference counts `determined` entries only."""
    if found.shape != expected.shape:
        return math.inf
    wide = torch.complex128 if expected.is_complex() else torch.float64
    difference = found.to(wide) - expected.to(wide)
    if determined is not None:
        difference = difference * determined
    size, scale = float(torch.linalg.vector_norm(difference)), float(torch.linalg.vector_norm(expected.to(wide)))
    if size == 0.0 or ((found.isnan() == expected.isnan()).all() and bool(expected.isnan().any())):
        return 0.0
    return size / scale if scale and math.isfinite(size) else math.inf


@dataclass(frozen=True)
class Rounding:
    """Gradients of one run in its own precision and in a wider one. Their difference is the rounding error."""

    own: Recorded
    wide: Recorded

    def determined(self, name: str) -> Tensor | None:
        """Returns a mask of the entries whose gradient rises above its rounding error, or None without a gradient."""
        if name not in self.own.names(1, "gradients"):
            return None
        signal: Tensor | None = None
        noise: Tensor | None = None
        for step in range(1, min(self.own.steps, self.wide.steps) + 1):
            wide = self.wide.tensor(name, step, "gradients").double()
            off = (self.own.tensor(name, step, "gradients").double() - wide).abs()
            signal = wide.abs() if signal is None else torch.maximum(signal, wide.abs())
            noise = off if noise is None else torch.maximum(noise, off)
        return None if signal is None or noise is None else signal > RISES * noise


def compare_runs(found: Recorded, expected: Recorded, bounds: Bounds, rounding: Rounding | None = None) -> Difference:
    """Compares `found` with `expected` step by step. A different number of steps is a difference, too."""
    steps = min(found.steps, expected.steps)
    losses = [relative(a, b) for a, b in zip(found.losses, expected.losses, strict=False)]
    norms = [relative(a, b) for a, b in zip(found.norms, expected.norms, strict=False)]
    names, missing = _names(found, expected)
    tensors, undetermined, first_tensor = [], [], None
    largest = 0.0
    for name in names:
        series = _series(found, expected, name, steps, None)
        if _beyond(series, bounds) is not None and rounding is not None:
            kept = rounding.determined(name)
            if kept is not None and not bool(kept.all()):
                series = _series(found, expected, name, steps, kept)
                count = int((~kept).sum())
                if _beyond(series, bounds) is None:
                    undetermined.append(TensorDifference(name, steps, max(series), count, kept.numel()))
        largest = max(largest, *series)
        step = _beyond(series, bounds)
        if step is not None:
            tensors.append(TensorDifference(name, step, max(series)))
            first_tensor = step if first_tensor is None else min(first_tensor, step)
    firsts = {
        "loss": _first(losses, bounds.loss),
        "gradient norm": _first(norms, bounds.norm),
        "parameters": 0 if missing else first_tensor,
    }
    if found.steps != expected.steps:
        firsts["number of steps"] = steps + 1
    beyond = {what: step for what, step in firsts.items() if step is not None}
    first = min(beyond, key=lambda what: beyond[what], default=None)
    return Difference(
        loss=max(losses, default=0.0),
        norm=max(norms, default=0.0),
        parameters=math.inf if missing else largest,
        first_step=None if first is None else beyond[first],
        first_in=first,
        tensors=tuple(sorted(tensors, key=lambda one: (-one.relative, one.name))),
        undetermined=tuple(undetermined),
        missing=tuple(missing),
    )


def _names(found: Recorded, expected: Recorded) -> tuple[list[str], list[str]]:
    ours, theirs = set(found.names()), set(expected.names())
    return sorted(ours & theirs), sorted(ours ^ theirs)


def _series(found: Recorded, expected: Recorded, name: str, steps: int, kept: Tensor | None) -> list[float]:
    return [
        tensor_relative(found.tensor(name, step), expected.tensor(name, step), kept if step else None)
        for step in range(steps + 1)
    ]


def _beyond(series: Sequence[float], bounds: Bounds) -> int | None:
    """Returns the first step beyond the bound. The initial weights, step 0, must be bit-equal."""
    if series[0] > 0.0:
        return 0
    return _first(series[1:], bounds.parameters)


def _first(series: Iterable[float], bound: float) -> int | None:
    return next((step for step, value in enumerate(series, 1) if not value <= bound), None)
