"""The plain loop that tests compare with, and a cosine schedule written out for it."""

from __future__ import annotations

import math

from disttrain.parity.plain_loop import plain_loop

__all__ = ["cosine_rates", "plain_loop"]


def cosine_rates(peak: float, *, warmup: int, steps: int) -> list[float]:
    """Returns the learning rate of each step from 0: linear warm-up, then half a cosine down to zero at `steps`."""
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append(peak * (step + 1) / warmup)
        else:
            rates.append(peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
    return rates
