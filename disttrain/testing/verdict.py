"""Compares the numbers of a contract case with the plain loop, which it runs, and describes every violation.

Bounds are relative. float32 and float64 use the bounds of `parity`; within them only the order of sums differs.

bf16 keeps 8 bits, so one rounding is up to u = 2**-8. A strategy may round differently than autocast in one process:
weights may be communicated as bf16, and sums may have fewer items.

- Loss: 3 u. A logit differs by three roundings at most (weight, input, output), and the loss has the size of a logit.
- Norm: 8 u. A gradient passes through as many roundings again in the backward, plus the rounding of the last
  micro-batch.
- Final values: 10 u. A parameter that autocast keeps in float32, such as a norm's, may be communicated as bf16, and so
  may its gradient. With AdamW the bound is larger: AdamW divides the step of each entry by its size, so that
  the rounding of small entries counts as much as the rounding of large ones. The plain loop in bf16 itself ends as far
  from the plain loop in float32. The distance of any one tensor is chance (ddp on 2 ranks reached a third of the plain
  loop's distance, on 3 ranks the same), so the scale is the largest distance of all tensors of the model. Two runs that
  round differently may deviate in opposite directions, so the bound is twice that scale if it exceeds 10 u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disttrain.parity import compare as parity_compare
from disttrain.parity.compare import Bounds, relative, tensor_relative
from disttrain.testing.cases import Case
from disttrain.testing.ranks import Ran
from disttrain.testing.reference import Reference, reference

_U = 2.0**-8
BOUNDS: Mapping[str, Bounds] = {**parity_compare.BOUNDS, "bf16": Bounds(3 * _U, 8 * _U, 10 * _U)}
"""The bounds of each precision. `parameters` applies to the final value of each tensor."""

_ROUNDING = torch.finfo(torch.float32).eps


@dataclass
class Verdict:
    """The result of one case: faults in words, the largest differences of loss, norm and parameters, and the number of
    undetermined entries of each parameter, which were left out."""

    case: Case
    faults: list[str] = field(default_factory=list)
    loss: float = 0.0
    norm: float = 0.0
    parameters: float = 0.0
    undetermined: dict[str, int] = field(default_factory=dict)


def judge(case: Case, ranks: Sequence[Ran]) -> Verdict:
    """Compares the runs of one case, in rank order, with the plain loop. Local."""
    verdict = Verdict(case)
    for rank, ran in enumerate(ranks):
        if ran.error is not None:
            verdict.faults.append(f"rank {rank} raised\n{ran.error}")
    if verdict.faults:
        return verdict
    expected = reference(case.model, case.optimizer, case.clip, case.precision)
    _judge_first(verdict, ranks[0], expected)
    verdict.loss = _judge_steps(verdict, "loss", ranks[0].losses, expected.losses, BOUNDS[case.precision].loss)
    verdict.norm = _judge_steps(verdict, "gradient norm", ranks[0].norms, expected.norms, BOUNDS[case.precision].norm)
    for rank, ran in enumerate(ranks):
        if (ran.losses, ran.norms) != (ranks[0].losses, ranks[0].norms):
            verdict.faults.append(f"rank {rank} reports different losses or norms than rank 0")
    _judge_last(verdict, ranks[0], expected)
    return verdict


def _judge_first(verdict: Verdict, ran: Ran, expected: Reference) -> None:
    if ran.first.keys() != expected.first.keys():
        differ = ", ".join(sorted(ran.first.keys() ^ expected.first.keys()))
        verdict.faults.append(f"the names of the weights differ from the model's state dict: {differ}")
        return
    for name, value in expected.first.items():
        if not torch.equal(torch.from_numpy(ran.first[name]).to(value.dtype), value):
            verdict.faults.append(f"{name} does not start with the constructor's values, bit for bit")


def _judge_steps(
    verdict: Verdict, what: str, found: Sequence[float | None], expected: Sequence[float], bound: float
) -> float:
    """Returns the largest relative difference over the steps. The first step beyond the bound is a fault."""
    if len(found) != len(expected):
        verdict.faults.append(f"{len(found)} steps instead of {len(expected)}")
        return math.inf
    apart = [math.inf if a is None else relative(a, b) for a, b in zip(found, expected, strict=True)]
    for step, difference in enumerate(apart):
        if difference > bound:
            numbers = f"{found[step]} instead of {expected[step]}, {difference:.1e} apart (bound {bound:.1e})"
            verdict.faults.append(f"step {step + 1}: {what} {numbers}")
            break
    return max(apart)


def _judge_last(verdict: Verdict, ran: Ran, expected: Reference) -> None:
    case = verdict.case
    bound = BOUNDS[case.precision].parameters
    if case.precision == "bf16":
        exact = reference(case.model, case.optimizer, case.clip, "fp32")
        bound = max(
            bound, 2 * max(tensor_relative(*_determined(case, name, expected, exact)) for name in expected.last)
        )
    for name, value in expected.last.items():
        if name not in ran.last:
            verdict.faults.append(f"{name} is missing from the final weights")
            continue
        found, wanted = torch.from_numpy(ran.last[name]).double(), value.double()
        out = undetermined(verdict.case, name)
        if out is not None:
            verdict.undetermined[name] = int(out.sum())
            found, wanted = found[~out], wanted[~out]
        apart = tensor_relative(found, wanted)
        verdict.parameters = max(verdict.parameters, apart)
        if not apart <= bound:
            verdict.faults.append(f"after the last step: {name} is {apart:.1e} apart (bound {bound:.1e})")


def _determined(case: Case, name: str, *references: Reference) -> list[Tensor]:
    """Returns the final values of a parameter in each reference, without its undetermined entries."""
    out = undetermined(case, name)
    last = [one.last[name].double() for one in references]
    return last if out is None else [value[~out] for value in last]


def undetermined(case: Case, name: str) -> Tensor | None:
    """Returns a mask of the entries whose gradient is nothing but rounding error, or None if there are none.

    AdamW turns such a gradient into full steps whose direction depends on the order of sums. An entry is undetermined
    if float32 shows a gradient and float64 does not, over all steps. The limit is one float32 epsilon of the largest
    gradient norm, which bounds the values that the entry was summed from. In float64 no entry is undetermined.
    """
    if case.precision == "fp64":
        return None
    true = reference(case.model, case.optimizer, case.clip, "fp64")
    shown = reference(case.model, case.optimizer, case.clip, case.precision)
    if name not in true.largest:
        return None
    out: Tensor = (true.largest[name] <= _ROUNDING * true.norm) & (shown.largest[name] > 0)
    return out if bool(out.any()) else None
