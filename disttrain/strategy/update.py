"""The step as one act for strategies whose optimizer is torch's own: scale, clip, step, schedule, zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from disttrain.strategy.arithmetic import Gradients, refuse_non_finite
from disttrain.strategy.contract import Prepared, StepOutcome, StepSums


def torch_step(
    prepared: Prepared,
    sums: StepSums,
    *,
    clip_norm: float | None,
    want_norm: bool,
    factor: float = 1.0,
    square: Callable[[Gradients], Tensor] = Gradients.square,
    keep: bool = False,
) -> StepOutcome:
    """`factor` turns the gradients at hand into those of the summed loss (DDP averages over ranks); `square` gives the
    global sum of squares; with `keep` gradients stay in memory, as zeros. The norm is read, and refused if it is not
    finite, before a weight changes. Scaled gradients always have theirs read, and where it is not finite the step is
    skipped: neither weights nor schedule move."""
    if prepared.optimizer is None:
        raise ValueError(f"{prepared.name!r} was prepared without an optimizer: it cannot step")
    prepared.updates += 1
    prepared.accumulations = 0
    rate = float(prepared.optimizer.param_groups[0]["lr"])
    if sums.weight == 0.0:
        prepared.optimizer.zero_grad(set_to_none=not keep)
        return StepOutcome(None, applied=False, lr=rate)
    gradients = Gradients(prepared)
    scale = factor / sums.denominator
    norm, loss_scale = None, prepared.loss_scale.value if sums.scaled else None
    if want_norm or clip_norm or sums.scaled:
        norm = math.sqrt(float(square(gradients))) * abs(scale)
        finite = math.isfinite(norm)
        if not finite:
            prepared.optimizer.zero_grad(set_to_none=not keep)
        if sums.scaled:
            prepared.loss_scale.update(finite=finite, weight=sums.weight)
        elif not finite:
            refuse_non_finite(f"a gradient norm of {norm}")
        if not finite:
            return StepOutcome(None, applied=False, lr=rate, loss_scale=loss_scale)
    if clip_norm and norm is not None:
        # torch.nn.utils.clip_grad_norm_'s own form, its 1e-6 included, so that plain loops agree.
        scale *= min(1.0, clip_norm / (norm + 1e-6))
    gradients.scale(scale)
    with torch.no_grad():
        prepared.optimizer.step()
    if prepared.schedule is not None:
        prepared.schedule.step()
    prepared.optimizer.zero_grad(set_to_none=not keep)
    return StepOutcome(norm, applied=True, lr=rate, loss_scale=loss_scale)
