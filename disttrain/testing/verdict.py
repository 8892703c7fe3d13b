"""What a run's numbers are held to, and what is said where they do not hold. Runs the plain loop it compares with.

Bounds, relative: float32 within 1e-5 (loss and norm at each step) and 1e-4 (each tensor's final values, in 2-norm);
float64 1e-9. What is left within them is the order of sums.
bf16 keeps 8 bits: one rounding is up to u = 2**-8 relative. Where a strategy rounds otherwise than autocast in one
process (weights that travel as bf16, sums of fewer items) a logit differs by three roundings at most, of weight, input
and output, and the loss is of the logits' size: 3 u. A gradient has gone through as many again on its way back, and
with the last micro-batch's own rounding that is 8 u, for the norm. What it moved is held to 10 u: a parameter that
autocast leaves wide, such as a norm's, may travel as bf16 too, and so may its gradient.
AdamW divides each entry's step by the entry's own size, so that small entries' roundings count as much as large ones:
the plain loop in bf16 itself ends that far from the plain loop in float32. How far is chance for any one tensor (ddp at
2 ranks came to a third of the plain loop's distance, at 3 to the same), so its scale is the largest of all the model's
tensors. Two that round differently may be as far to either side: final values are held to twice that, where it is more
than 10 u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disttrain.testing.cases import Case
from disttrain.testing.reference import Reference, reference
from disttrain.testing.ranks import Ran

_U = 2.0**-8
BOUNDS: dict[str, tuple[float, float, float]] = {
    "fp32": (1e-5, 1e-5, 1e-4),
    "fp64": (1e-9, 1e-9, 1e-9),
    "bf16": (3 * _U, 8 * _U, 10 * _U),
}
"""precision -> largest relative difference of the loss, of the norm, and of a final tensor."""

_ROUNDING = torch.finfo(torch.float32).eps


@dataclass
class Verdict:
    """What was found of one case: faults in words, largest differences of loss, norm and parameters, and how many
    entries of which parameter were left out as undetermined."""

    case: Case
    faults: list[str] = field(default_factory=list)
    loss: float = 0.0
    norm: float = 0.0
    parameters: float = 0.0
    undetermined: dict[str, int] = field(default_factory=dict)


def judge(case: Case, ranks: Sequence[Ran]) -> Verdict:
    """Hold one case's runs, in rank order, to the plain loop."""
    verdict = Verdict(case)
    for rank, ran in enumerate(ranks):
        if ran.error is not None:
            verdict.faults.append(f"rank {rank} raised\n{ran.error}")
    if verdict.faults:
        return verdict
    expected = reference(case.model, case.optimizer, case.clip, case.precision)
    _judge_first(verdict, ranks[0], expected)
    verdict.loss = _judge_steps(verdict, "loss", ranks[0].losses, expected.losses, BOUNDS[case.precision][0])
    verdict.norm = _judge_steps(verdict, "gradient norm", ranks[0].norms, expected.norms, BOUNDS[case.precision][1])
    for rank, ran in enumerate(ranks):
        if (ran.losses, ran.norms) != (ranks[0].losses, ranks[0].norms):
            verdict.faults.append(f"rank {rank} reports other losses or norms than rank 0")
    _judge_last(verdict, ranks[0], expected)
    return verdict


def _judge_first(verdict: Verdict, ran: Ran, expected: Reference) -> None:
    if ran.first.keys() != expected.first.keys():
        differ = ", ".join(sorted(ran.first.keys() ^ expected.first.keys()))
        verdict.faults.append(f"the weights have other names than the model's state dict: {differ}")
        return
    for name, value in expected.first.items():
        if not torch.equal(torch.from_numpy(ran.first[name]).to(value.dtype), value):
            verdict.faults.append(f"{name} does not begin with the constructor's values, bit for bit")


def _judge_steps(
    verdict: Verdict, what: str, found: Sequence[float | None], expected: Sequence[float], bound: float
) -> float:
    """The largest relative difference over the steps; the first that is too large is a fault."""
    if len(found) != len(expected):
        verdict.faults.append(f"{len(found)} steps instead of {len(expected)}")
        return math.inf
    apart = [
        math.inf if a is None or not math.isfinite(a) else abs(a - b) / abs(b)
        for a, b in zip(found, expected, strict=True)
    ]
    for step, difference in enumerate(apart):
        if difference > bound:
            numbers = f"{found[step]} instead of {expected[step]}, {difference:.1e} apart (bound {bound:.1e})"
            verdict.faults.append(f"step {step + 1}: {what} {numbers}")
            break
    return max(apart)


def _judge_last(verdict: Verdict, ran: Ran, expected: Reference) -> None:
    case = verdict.case
    bound = BOUNDS[case.precision][2]
    if case.precision == "bf16":
        exact = reference(case.model, case.optimizer, case.clip, "fp32")
        bound = max(bound, 2 * max(_apart(*_determined(case, name, expected, exact)) for name in expected.last))
    for name, value in expected.last.items():
        if name not in ran.last:
            verdict.faults.append(f"{name} is not among the final weights")
            continue
        found, wanted = torch.from_numpy(ran.last[name]).double(), value.double()
        out = undetermined(verdict.case, name)
        if out is not None:
            verdict.undetermined[name] = int(out.sum())
            found, wanted = found[~out], wanted[~out]
        apart = _apart(found, wanted)
        verdict.parameters = max(verdict.parameters, apart)
        if not apart <= bound:
            verdict.faults.append(f"after the last step: {name} is {apart:.1e} apart (bound {bound:.1e})")


def _determined(case: Case, name: str, *references: Reference) -> list[Tensor]:
    """A parameter's final values in each reference, without the entries that are undetermined."""
    out = undetermined(case, name)
    last = [one.last[name].double() for one in references]
    return last if out is None else [value[~out] for value in last]


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in 2-norm."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30)) if wanted.numel() else 0.0


def undetermined(case: Case, name: str) -> Tensor | None:
    """Which entries of a parameter have a gradient that is rounding and nothing else: AdamW makes whole steps of it,
    another way in every order of sums. None where there are none, and in float64.

    Rounding is what float32 shows and float64, over all steps, does not: never above one float32 epsilon of the whole
    gradient's largest norm, which is what the values it was summed from amount to at most.
    """
    if case.precision == "fp64":
        return None
    true = reference(case.model, case.optimizer, case.clip, "fp64")
    shown = reference(case.model, case.optimizer, case.clip, case.precision)
    if name not in true.largest:
        return None
    out: Tensor = (true.largest[name] <= _ROUNDING * true.norm) & (shown.largest[name] > 0)
    return out if bool(out.any()) else None
