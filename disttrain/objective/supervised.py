"""`cross_entropy` and `mse`: classification and regression. Enters: configs (`objective.target`).

Both read `(inputs, targets)`, or a mapping with the keys `inputs` and `targets`; inputs that are themselves a mapping
go to the model as keyword arguments. Both add up; their weights make them equal torch's own `reduction="mean"`.
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
    """Logits [b, classes, ...] against classes [b, ...] (int64) or class probabilities [b, classes, ...].

    Weight: the targets that are not `ignore_index` (with probabilities: all of them). Summarizes `accuracy`.
    """

    def __init__(self, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if not (isinstance(label_smoothing, int | float) and 0.0 <= label_smoothing <= 1.0):
            raise ConfigError(
                explain("cross_entropy's label_smoothing is a share.", repr(label_smoothing), "choose one from 0 to 1")
            )
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def weigh(self, batch: Any) -> Tensor | float:
        """The number of targets that count."""
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
                    "cross_entropy needs a row of logits for each target.",
                    f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)} of {targets.dtype}",
                    "let the model return [batch, classes, ...] for classes [batch, ...] of type int64",
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
    """Squared error over outputs and targets of one shape: the sum over all elements, weight their number.

    So the loss is that of `nn.MSELoss()` over the whole global batch. Summarizes `rmse`.
    """

    def weigh(self, batch: Any) -> float:
        """The number of target elements."""
        return float(read_pair(batch, "mse")[1].numel())

    def forward(self, model: Any, batch: Any) -> Any:
        return call_model(model, read_pair(batch, "mse")[0])

    def loss(self, output: Any, batch: Any) -> tuple[Tensor, float]:
        targets: Tensor = read_pair(batch, "mse")[1]
        outputs = read_output(output, "mse")
        if outputs.shape != targets.shape:
            # torch would broadcast [b, 1] against [b] to [b, b], and train on it with no more than a warning.
            raise TrainingError(
                explain(
                    "mse compares outputs and targets element by element.",
                    f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}",
                    "give both the same shape, for instance targets [batch, 1] for outputs [batch, 1]",
                )
            )
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum"), float(targets.numel())

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        weight = float(sums["weight/loss"])
        return {"rmse": math.sqrt(float(sums["total/loss"]) / weight)} if weight else {}
