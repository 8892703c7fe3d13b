"""How far two recorded runs are apart: loss, gradient norm and every tensor at every step, against stated bounds.

Entries whose gradient never rises above its own rounding are told apart: an optimizer such as AdamW makes steps of
nothing there. Holds one tensor of each run at a time. Pure but for reading the recordings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disttrain.parity.recorded import Recorded

RISES = 10.0
"""A gradient's entry is above rounding where it is known to better than a tenth at some step."""

_EPSILON = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Bounds:
    """The largest relative differences that count as equal; `parameters` is of a tensor's 2-norm."""

    loss: float
    norm: float
    parameters: float


def bounds_for(compute: str, master: str) -> Bounds:
    """fp32: 1e-5, parameters 1e-4; fp64: 1e-9. bf16 and fp16: the type's epsilon e for the loss, an average over items
    that were each rounded so; 4 e for norm and parameters, which another order of sums rounds once more at each layer.
    """
    if compute == "fp64":
        return Bounds(1e-9, 1e-9, 1e-9)
    epsilon = max(_EPSILON.get(compute, 0.0), _EPSILON.get(master, 0.0))
    return Bounds(epsilon, 4 * epsilon, 4 * epsilon) if epsilon else Bounds(1e-5, 1e-5, 1e-4)


@dataclass(frozen=True)
class TensorDifference:
    """`relative` is norm(a - b) / norm(b) at `step`, without the `undetermined` of the tensor's `entries`."""

    name: str
    step: int
    relative: float
    undetermined: int = 0
    entries: int = 0


@dataclass(frozen=True)
class Difference:
    """The largest relative differences over the steps; `first_step` is the first beyond a bound, in `first_in`.

    Step 0 is the initial weights, which are to be bit-equal. `tensors` are those beyond the bound at some step, worst
    first; `undetermined` those that are not, once entries without a gradient are left out; `missing` names that only
    one side has.
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
    """Relative difference of two numbers; infinite where just one is not finite."""
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return 0.0
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def tensor_relative(found: Tensor, expected: Tensor, determined: Tensor | None = None) -> float:
    """norm(found - expected) / norm(expected) in float64; the difference over `determined` entries alone."""
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
    """Two recordings of one run's gradients, in its own precision and in a wider one: what differs is rounding."""

    own: Recorded
    wide: Recorded

    def determined(self, name: str) -> Tensor | None:
        """Where the gradient of `name` rises above its rounding at some step, by entry; None for what has none."""
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
    """`found` against `expected`, step by step. Where both have another number of steps, that is a difference too."""
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
    """The first step that is too far; the initial weights are to be bit-equal."""
    if series[0] > 0.0:
        return 0
    return _first(series[1:], bounds.parameters)


def _first(series: Iterable[float], bound: float) -> int | None:
    return next((step for step, value in enumerate(series, 1) if not value <= bound), None)
