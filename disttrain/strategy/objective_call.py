"""The call of an objective on a model, as a module: what wrappers that hook `forward` wrap."""

from __future__ import annotations

from typing import Any

from torch import nn

from disttrain.objective import Context, Objective


class ObjectiveCall(nn.Module):
    """Returns three mappings (totals, weights, sums) in a tuple, so that wrappers find the tensors in it."""

    def __init__(self, model: nn.Module, objective: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, objective: Objective, batch: Any, context: Context) -> tuple[Any, Any, Any]:
        loss = objective(self.model, batch, context)
        return loss.totals, loss.weights, loss.sums
