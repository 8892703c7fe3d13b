"""What each prepared model is trained for: the objective it was prepared with, one named later, or the config's own.

Refuses an objective with parameters that nothing would train. Enters: `Engine`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from disttrain.config import Config
from disttrain.engine import build
from disttrain.errors import ConfigError, explain
from disttrain.objective import Objective
from disttrain.strategy import World
from disttrain.strategy.construction import check_same_everywhere


class Objectives:
    """By the model's name."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._known: dict[str, Objective] = {}

    def adopt(self, name: str, objective: Any) -> nn.Module | None:
        """Keep what a model is prepared with; its module, placed and to be trained with the model, if it is one.

        Collective where it is a module.
        """
        if objective is None:
            return None
        adapted = objective if isinstance(objective, Objective) else Objective(objective)
        self._known[name] = adapted
        module = adapted.module
        if module is not None:
            check_same_everywhere(self._world, module, f"{name}'s objective")
            module.to(device=self._world.device, dtype=self._world.dtype)
        return module

    def find(self, name: str, objective: Any) -> Objective:
        """The one given, adapted; where none is, the model's own or the config's. Local. Raises ConfigError."""
        if objective is None:
            if name not in self._known:
                self._known[name] = build.objective_of(self._config)
            return self._known[name]
        known = self._known.get(name)
        if known is not None and objective in (known, known.user):
            return known
        found = objective if isinstance(objective, Objective) else Objective(objective)
        if found.module is not None and any(parameter.requires_grad for parameter in found.module.parameters()):
            raise ConfigError(
                explain(
                    f"accumulate({name!r}, ...) with an objective that has parameters to train.",
                    f"{found!r}, which was not prepared with the model: nothing would train them",
                    f"pass it to prepare({name!r}, ..., objective=...)",
                )
            )
        return found
