"""Learning-rate schedules as closed forms of the step: resumable from a number, stretchable by a larger run.steps.

`warmup` and `decay` are steps (int) or a share of the run (float below 1). The shapes are pure functions from step to
a factor of the peak rate; the named schedules wrap them in torch's LambdaLR.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from disttrain.errors import ConfigError, explain

Shape = Callable[[int], float]


def warmed(step: int, warmup: int) -> float:
    """Linear up to 1 over `warmup` steps; the first step already moves: (step + 1) / warmup. Pure."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def linear_factor(step: int, *, total: int, warmup: int, end: float) -> float:
    """Warm-up, then a straight line to `end` at step `total`. Pure."""
    if step < warmup:
        return warmed(step, warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 + (end - 1.0) * done


def cosine_factor(step: int, *, total: int, warmup: int, end: float) -> float:
    """Warm-up, then half a cosine to `end` at step `total` (arXiv 1608.03983, without restarts). Pure."""
    if step < warmup:
        return warmed(step, warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_stable_decay_factor(step: int, *, total: int, warmup: int, decay: int, end: float) -> float:
    """Warm-up, a plateau, and a straight line to `end` over the last `decay` steps (arXiv 2404.06395). Pure."""
    if step < warmup:
        return warmed(step, warmup)
    start = max(warmup, total - decay)
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    return 1.0 + (end - 1.0) * done


def constant(optimizer: Optimizer, total_steps: int, warmup: int | float = 0) -> LambdaLR:
    """The peak rate, after a warm-up."""
    steps = as_steps(warmup, total_steps, "warmup")
    return LambdaLR(optimizer, lambda step: warmed(step, steps))


def linear(optimizer: Optimizer, total_steps: int, warmup: int | float = 0, end: float = 0.0) -> LambdaLR:
    """Straight down to `end` times the peak rate."""
    steps = as_steps(warmup, total_steps, "warmup")
    _check_end(end)
    return LambdaLR(optimizer, lambda step: linear_factor(step, total=total_steps, warmup=steps, end=end))


def cosine(optimizer: Optimizer, total_steps: int, warmup: int | float = 0, end: float = 0.0) -> LambdaLR:
    """Half a cosine down to `end` times the peak rate."""
    steps = as_steps(warmup, total_steps, "warmup")
    _check_end(end)
    return LambdaLR(optimizer, lambda step: cosine_factor(step, total=total_steps, warmup=steps, end=end))


def warmup_stable_decay(
    optimizer: Optimizer, total_steps: int, warmup: int | float, decay: int | float, end: float = 0.0
) -> LambdaLR:
    """Up, level, and down over the last `decay` steps."""
    up, down = as_steps(warmup, total_steps, "warmup"), as_steps(decay, total_steps, "decay")
    _check_end(end)
    return LambdaLR(
        optimizer,
        lambda step: warmup_stable_decay_factor(step, total=total_steps, warmup=up, decay=down, end=end),
    )


def as_steps(amount: int | float, total: int, name: str) -> int:
    """Steps as they are, a share as steps. Raises ConfigError for what is neither. Pure."""
    share = isinstance(amount, float) and 0 <= amount < 1
    whole = isinstance(amount, int | float) and amount >= 0 and float(amount).is_integer()
    if isinstance(amount, bool) or not (share or whole):
        raise ConfigError(
            explain(
                f"schedule.args.{name} is a number of steps, or a share of the run.", repr(amount), "e.g. 100 or 0.1"
            )
        )
    return round(amount * total) if share else int(amount)


def _check_end(end: float) -> None:
    if isinstance(end, bool) or not (isinstance(end, int | float) and 0 <= end < math.inf):
        raise ConfigError(
            explain("schedule.args.end is a share of the peak rate.", repr(end), "e.g. 0.1, or 0 to end at nothing")
        )
