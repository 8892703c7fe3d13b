"""Provides learning-rate schedules that are closed forms of the step.

They resume from the step's number, and a larger run.steps stretches them. `warmup` and `decay` are steps (int) or a
share of the run (float below 1). The shapes are pure functions from a step to a factor of the peak rate. The named
schedules wrap the shapes in torch's LambdaLR.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from disttrain.errors import ConfigError, explain

Shape = Callable[[int], float]


def warmed(step: int, warmup: int) -> float:
    """Rise linearly to 1 over `warmup` steps: (step + 1) / warmup, so that the first step already trains. Pure."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def linear_factor(step: int, *, total: int, warmup: int, end: float) -> float:
    """Warm up, then change linearly to `end` at step `total`. Pure."""
    if step < warmup:
        return warmed(step, warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 + (end - 1.0) * done


def cosine_factor(step: int, *, total: int, warmup: int, end: float) -> float:
    """Warm up, then follow half a cosine to `end` at step `total` (arXiv 1608.03983, without restarts). Pure."""
    if step < warmup:
        return warmed(step, warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_stable_decay_factor(step: int, *, total: int, warmup: int, decay: int, end: float) -> float:
    """Warm up, stay at 1, then change linearly to `end` over the last `decay` steps (arXiv 2404.06395). Pure."""
    if step < warmup:
        return warmed(step, warmup)
    start = max(warmup, total - decay)
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    return 1.0 + (end - 1.0) * done


def constant(optimizer: Optimizer, total_steps: int, warmup: int | float = 0) -> LambdaLR:
    """Warm up to the peak rate, then keep it. Local."""
    steps = as_steps(warmup, total_steps, "warmup")
    return LambdaLR(optimizer, lambda step: warmed(step, steps))


def linear(optimizer: Optimizer, total_steps: int, warmup: int | float = 0, end: float = 0.0) -> LambdaLR:
    """Warm up to the peak rate, then fall linearly to `end` times the peak rate. Local."""
    steps = as_steps(warmup, total_steps, "warmup")
    _check_end(end)
    return LambdaLR(optimizer, lambda step: linear_factor(step, total=total_steps, warmup=steps, end=end))


def cosine(optimizer: Optimizer, total_steps: int, warmup: int | float = 0, end: float = 0.0) -> LambdaLR:
    """Warm up to the peak rate, then fall along half a cosine to `end` times the peak rate. Local."""
    steps = as_steps(warmup, total_steps, "warmup")
    _check_end(end)
    return LambdaLR(optimizer, lambda step: cosine_factor(step, total=total_steps, warmup=steps, end=end))


def warmup_stable_decay(
    optimizer: Optimizer, total_steps: int, warmup: int | float, decay: int | float, end: float = 0.0
) -> LambdaLR:
    """Warm up to the peak rate, keep it, then fall linearly over the last `decay` steps. Local."""
    up, down = as_steps(warmup, total_steps, "warmup"), as_steps(decay, total_steps, "decay")
    _check_end(end)
    return LambdaLR(
        optimizer,
        lambda step: warmup_stable_decay_factor(step, total=total_steps, warmup=up, decay=down, end=end),
    )


def as_steps(amount: int | float, total: int, name: str) -> int:
    """Convert a share of the run to steps; return steps unchanged. Pure; raises ConfigError for other values."""
    share = isinstance(amount, float) and 0 <= amount < 1
    steps = isinstance(amount, int | float) and amount >= 0 and float(amount).is_integer()
    if isinstance(amount, bool) or not (share or steps):
        problem = f"{amount!r} is neither a number of steps nor a share of the run"
        raise ConfigError(explain(f"Cannot use schedule.args.{name}.", problem, "write e.g. 100 or 0.1"))
    return round(amount * total) if share else int(amount)


def _check_end(end: float) -> None:
    if isinstance(end, bool) or not (isinstance(end, int | float) and 0 <= end < math.inf):
        problem = f"{end!r} is not a share of the peak rate"
        raise ConfigError(explain("Cannot use schedule.args.end.", problem, "write e.g. 0.1, or 0 to end at zero"))
