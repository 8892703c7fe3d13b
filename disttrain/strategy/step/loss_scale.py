"""Dynamic loss scaling for fp16, whose gradients would vanish below 6e-8 and overflow above 65504.

Rates as torch.amp.GradScaler's (torch 2.13): from 2**16, doubled after 2000 applied steps in a row, halved by a step
that is skipped because its gradient is not finite. Here it scales the step's *mean* loss: a sum over thousands of items
is divided by (a power of two near) their number first, so that the scale means the same whatever the batch.
All numbers are powers of two and come from sums over all ranks: equal on every rank, strategy and world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from disttrain.errors import TrainingError, explain

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


@dataclass
class LossScale:
    """`value` is the scale, `applied` the steps since it changed, `weight` what a step's summed loss is divided by.

    The weight is the step's own where the objective knows it before its forward (`weigh`), else that of the step
    before; the first step has none, and may be skipped for it.
    """

    value: float = 2.0**16
    applied: int = 0
    weight: float = 1.0

    def expect(self, weight: float) -> None:
        """The step's weight, known before its first backward. Local."""
        if weight > 0.0:
            self.weight = 2.0 ** round(math.log2(weight))

    def factor(self, *, divided: bool) -> float:
        """What a micro-batch's total is multiplied by: the scale over the weight, or the scale alone where the loss is
        `divided` by its weights already. Local."""
        return self.value if divided else self.value / self.weight

    def update(self, *, finite: bool, weight: float) -> None:
        """After a step of this weight whose gradient was finite or not. Local: every rank comes to the same.

        Raises TrainingError where no scale is left to try.
        """
        self.expect(weight)
        self.applied = self.applied + 1 if finite else 0
        if not finite:
            self.value *= BACKOFF
        elif self.applied == INTERVAL:
            self.value, self.applied = self.value * GROWTH, 0
        if self.value < 1.0:
            raise TrainingError(
                explain(
                    "fp16 scales the loss so that gradients are finite, and skips a step where they are not.",
                    "gradients that are not finite at a scale of 1; the weights have not been changed by such steps",
                    "look at these steps' samples, lower the learning rate, or use precision.compute=bf16",
                )
            )
