"""Scales losses under fp16, whose gradients would vanish below 6e-8 and overflow above 65504.

The rates are those of torch.amp.GradScaler (torch 2.13). The scale starts at 2**16, doubles after 2000 applied steps in
a row, and halves when a step is skipped because its gradient is not finite. It scales the step's *mean* loss: a sum
over thousands of items is first divided by their number, rounded to a power of two. The scale then does not depend on
the batch size. All factors are powers of two and come from sums over all ranks. They are therefore equal on every
rank, for every strategy and world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from disttrain.errors import TrainingError, explain

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


@dataclass
class LossScale:
    """The scale of the loss.

    Attributes:
        value: the scale.
        applied: the number of applied steps since the scale changed.
        weight: the divisor of a step's summed loss. It is the weight of this step where the objective has `weigh`, and
            that of the step before otherwise. The first step then has none, and may be skipped because of it.
    """

    value: float = 2.0**16
    applied: int = 0
    weight: float = 1.0

    def expect(self, weight: float) -> None:
        """Set the step's weight before its first backward. Local."""
        if weight > 0.0:
            self.weight = 2.0 ** round(math.log2(weight))

    def factor(self, *, divided: bool) -> float:
        """Return the factor of a micro-batch's total: the scale divided by the weight. Local.

        It is the scale alone where the loss is already `divided` by its weights.
        """
        return self.value if divided else self.value / self.weight

    def update(self, *, finite: bool, weight: float) -> None:
        """Update the scale after a step of this weight. Local, with an equal result on every rank.

        Raises TrainingError where the scale falls below 1.
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
                    "Cannot find a loss scale for fp16 at which gradients are finite.",
                    "gradients are not finite at a scale of 1; such steps were skipped and changed no weights",
                    "look at these steps' samples, lower the learning rate, or use precision.compute=bf16",
                )
            )
