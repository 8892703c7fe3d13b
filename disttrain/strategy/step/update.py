"""Takes a step with torch's optimizers: scales and clips gradients, steps optimizer and schedule, zeroes gradients."""

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
    """Take a step. Collective where `square` is.

    The norm is read before a weight changes. Where it is not finite the step is rejected. Under fp16 the norm is always
    read, and a step whose norm is not finite is skipped: weights and schedule stay as they are.

    Args:
        prepared: the model with its optimizer.
        sums: the step's sums over all ranks.
        clip_norm: the largest global norm, or None for no clipping.
        want_norm: whether the caller needs the norm.
        factor: turns the gradients into those of the summed loss, where DDP has averaged them over ranks.
        square: returns the global sum of squares of the gradients.
        keep: whether gradients stay in memory as zeros.

    Raises TrainingError for a norm that is not finite, and ValueError for a model without an optimizer.
    """
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
            # The formula of torch.nn.utils.clip_grad_norm_ with its 1e-6, so that plain loops give equal results.
            scale *= min(1.0, clip_norm / (norm + 1e-6))
        _step(prepared, gradients, scale, fused)
        if prepared.schedule is not None:
            prepared.schedule.step()
        gradients.drop(keep=keep)
        return StepOutcome(norm, applied=True, lr=rate, loss_scale=loss_scale)


def _fused(prepared: Prepared, gradients: Gradients) -> FusedAdam | None:
    """Return the fused step where it gives the result of the optimizer's step."""
    optimizer = prepared.optimizer
    assert optimizer is not None, "asked before"
    if prepared.fused is None or prepared.fused.optimizer is not optimizer:
        prepared.fused = FusedAdam(optimizer, prepared.parameters)
    return prepared.fused if prepared.fused.ready(gradients.held, gradients.dtype) else None


def _step(prepared: Prepared, gradients: Gradients, scale: float, fused: FusedAdam | None) -> None:
    """Step on gradients times `scale`, by `fused` where that is ready.

    float32 gradients are divided by a tensor, which torch's fused kernels do themselves, as under its GradScaler. That
    saves a pass over the gradients, and gives the same bits as a division before the step, which another rank may need.
    A hook before the step, or the step of a subclass, would see undivided gradients, so these get divided ones.
    """
    optimizer = prepared.optimizer
    assert optimizer is not None, "asked before"
    divisor = None
    if gradients.dtype is torch.float32 and scale != 1.0 and 1e-30 < scale < 1e30:
        # Without a wait for the device.
        divisor = torch.full((), 1.0 / scale, dtype=torch.float32, device=gradients.locals[0].device)
    within = divisor is not None and (fused is not None or (gradients.full and _takes_divisor(optimizer)))
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
