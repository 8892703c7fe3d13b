"""Implements the objectives `cross_entropy` (classification) and `mse` (regression) (`objective.target`).

Both read `(inputs, targets)`, or a mapping with the keys `inputs` and `targets`. If the inputs are a mapping, the model
receives them as keyword arguments. Both sum the losses, and divided by their weights they equal torch's
`reduction="mean"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.objective.batch import call_model, read_output, read_pair


class CrossEntropy:
    """Cross entropy of logits [b, classes, ...] for targets [b, ...] (int64) or probabilities [b, classes, ...].

    The weight is the number of targets that are not `ignore_index`, or with probabilities the number of all targets.
    The summary has `accuracy`.

    Args:
        ignore_index: targets with this value do not count.
        label_smoothing: from 0 to 1.
    """

    def __init__(self, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if not (isinstance(label_smoothing, int | float) and 0.0 <= label_smoothing <= 1.0):
            raise ConfigError(
                explain(
                    "The label_smoothing of cross_entropy is invalid.",
                    repr(label_smoothing),
                    "set a number from 0 to 1",
                )
            )
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def weigh(self, batch: Any) -> Tensor | float:
        """Return the number of targets that count."""
        return self._count(read_pair(batch, "cross_entropy")[1])

    def forward(self, model: Any, batch: Any) -> Any:
        return call_model(model, read_pair(batch, "cross_entropy")[0])

    def loss(self, output: Any, batch: Any) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        targets: Tensor = read_pair(batch, "cross_entropy")[1]
        logits = read_output(output, "cross_entropy")
        soft = targets.is_floating_point()
        if logits.dim() < 2 or targets.shape != (logits.shape if soft else logits.shape[:1] + logits.shape[2:]):
            raise TrainingError(
                explain(
                    "cross_entropy needs one row of logits for each target.",
                    f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)} of {targets.dtype}",
                    "return logits [batch, classes, ...] from the model, for targets [batch, ...] of type int64",
                )
            )
        if soft:
            targets = targets.to(logits.dtype)
            likeliest, counts = targets.argmax(1), torch.ones((), dtype=torch.bool, device=targets.device)
        else:
            targets = targets.long()
            likeliest, counts = targets, targets != self.ignore_index
        total = F.cross_entropy(
            logits,
            targets,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total, self._count(targets), {"correct": ((logits.argmax(1) == likeliest) & counts).sum()}

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        weight = float(sums["weight/loss"])
        return {"accuracy": float(sums["correct"]) / weight} if weight else {}

    def _count(self, targets: Tensor) -> Tensor | float:
        if targets.is_floating_point():
            return float(math.prod(targets.shape[:1] + targets.shape[2:]))
        return (targets != self.ignore_index).sum()


class MSE:
    """Squared error of outputs and targets of equal shape. The weight is the number of elements.

    The loss equals `nn.MSELoss()` over the complete global batch. The summary has `rmse`.
    """

    def weigh(self, batch: Any) -> float:
        """Return the number of elements of the targets."""
        return float(read_pair(batch, "mse")[1].numel())

    def forward(self, model: Any, batch: Any) -> Any:
        return call_model(model, read_pair(batch, "mse")[0])

    def loss(self, output: Any, batch: Any) -> tuple[Tensor, float]:
        targets: Tensor = read_pair(batch, "mse")[1]
        outputs = read_output(output, "mse")
        if outputs.shape != targets.shape:
            # torch would broadcast [b, 1] against [b] to [b, b], and would train on that with only a warning.
            raise TrainingError(
                explain(
                    "mse needs outputs and targets of the same shape.",
                    f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}",
                    "give both the same shape, for example targets [batch, 1] for outputs [batch, 1]",
                )
            )
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum"), float(targets.numel())

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        weight = float(sums["weight/loss"])
        return {"rmse": math.sqrt(float(sums["total/loss"]) / weight)} if weight else {}
