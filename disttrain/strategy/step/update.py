"""The step as one act for strategies whose optimizer is torch's own: scale, clip, step, schedule, zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from disttrain.strategy.contract import Prepared, StepOutcome, StepSums
from disttrain.strategy.step.arithmetic import Gradients, reject_non_finite
from disttrain.strategy.step.fused_adam import FusedAdam
from disttrain.torch_internals import divide_each
from disttrain.torch_internals.optimizers import may_set_grad_scale


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
    with torch.no_grad():
        gradients = Gradients(prepared)
        scale = factor / sums.denominator
        norm, loss_scale = None, prepared.loss_scale.value if sums.scaled else None
        squared = square(gradients) if want_norm or clip_norm or sums.scaled else None
        fused = _fused(prepared, gradients)  # while a device computes the norm
        if squared is not None:
            norm = math.sqrt(float(squared)) * abs(scale)
            finite = math.isfinite(norm)
            if sums.scaled:
                prepared.loss_scale.update(finite=finite, weight=sums.weight)
            if not finite:
                gradients.drop(keep=keep)
                if not sums.scaled:
                    reject_non_finite(f"a gradient norm of {norm}")
                return StepOutcome(None, applied=False, lr=rate, loss_scale=loss_scale)
        if clip_norm and norm is not None:
            # torch.nn.utils.clip_grad_norm_'s own form, its 1e-6 included, so that plain loops agree.
            scale *= min(1.0, clip_norm / (norm + 1e-6))
        _step(prepared, gradients, scale, fused)
        if prepared.schedule is not None:
            prepared.schedule.step()
        gradients.drop(keep=keep)
        return StepOutcome(norm, applied=True, lr=rate, loss_scale=loss_scale)


def _fused(prepared: Prepared, gradients: Gradients) -> FusedAdam | None:
    """The shorter way to step, where it is the same."""
    optimizer = prepared.optimizer
    assert optimizer is not None, "asked before"
    if prepared.fused is None or prepared.fused.optimizer is not optimizer:
        prepared.fused = FusedAdam(optimizer, prepared.parameters)
    return prepared.fused if prepared.fused.ready(gradients.held, gradients.dtype) else None


def _step(prepared: Prepared, gradients: Gradients, scale: float, fused: FusedAdam | None) -> None:
    """The optimizer's step on gradients times `scale`, by `fused` where that is ready.

    In float32 by a division, which torch's fused kernels do as they go, as under its GradScaler: no pass over the
    gradients of its own, and the same bits where one rank of several has to take the other way. A hook before the step
    would see them as they were, and a subclass's step too.
    """
    optimizer = prepared.optimizer
    assert optimizer is not None, "asked before"
    divisor = None
    if gradients.dtype is torch.float32 and scale != 1.0 and 1e-30 < scale < 1e30:
        # Without a wait for the device.
        divisor = torch.full((), 1.0 / scale, dtype=torch.float32, device=gradients.locals[0].device)
    within = divisor is not None and (fused is not None or (gradients.whole and _takes_divisor(optimizer)))
    if divisor is None:
        gradients.scale(scale)
    elif not within:
        divide_each(gradients.locals, divisor)
    if fused is not None:
        fused.step(gradients.locals, divisor)
    elif not within:
        optimizer.step()
    else:
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            optimizer.grad_scale = None  # type: ignore[attr-defined]


def _takes_divisor(optimizer: Optimizer) -> bool:
    return type(optimizer) in (Adam, AdamW, SGD, Adagrad) and may_set_grad_scale(optimizer)
