"""Calls an objective under autocast, inside the module that DeepSpeed wraps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from disttrain.objective import Context, Objective
from disttrain.strategy.contract import ObjectiveCall, World


class AutocastCall(ObjectiveCall):
    """The call of an objective under the world's autocast.

    With `cache=False` autocast does not keep a weight that it has cast. Stage 3 needs that: a cached cast of a gathered
    weight would stay in memory, complete, from forward to backward.
    """

    def __init__(self, model: nn.Module, objective: nn.Module | None, world: World, *, cache: bool) -> None:
        super().__init__(model, objective)
        self._device, self._dtype, self._cache = world.device.type, world.autocast, cache

    def forward(self, objective: Objective, batch: Any, context: Context) -> tuple[Any, Any, Any]:
        if self._dtype is None:
            return super().forward(objective, batch, context)
        with torch.autocast(self._device, dtype=self._dtype, cache_enabled=self._cache):
            return super().forward(objective, batch, context)
