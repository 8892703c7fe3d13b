"""Keeps the prepared models of an engine by name, each with the objective that it is trained for.

Rejects a second model of the same name, and an objective with parameters that nothing would train.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disttrain.config import Config
from disttrain.engine import build
from disttrain.engine.datasets import Datasets
from disttrain.errors import ConfigError, explain
from disttrain.model.batch_norm import synchronized
from disttrain.objective import Objective
from disttrain.optim.build import users_optimizer, users_schedule
from disttrain.optim.trials import reject_closures
from disttrain.strategy import AbstractStrategy, Ingredients, Prepared, World
from disttrain.strategy.construction import check_same_everywhere


class PreparedModels:
    """The prepared models, by name. Collective where a model or an objective is built."""

    def __init__(self, config: Config, world: World, strategy: AbstractStrategy, datasets: Datasets) -> None:
        self._config, self._world, self._strategy, self._datasets = config, world, strategy, datasets
        self.by_name: dict[str, Prepared] = {}
        self._objectives: dict[str, Objective] = {}

    def prepare(
        self,
        name: str,
        make_model: Callable[[], nn.Module] | None,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
        make_schedule: Callable[[Optimizer], LRScheduler] | None,
        objective: Any,
    ) -> Prepared:
        """Build a model by the strategy. Without `make_model`, build the config's model."""
        if name in self.by_name:
            raise ConfigError(
                explain(
                    f"Cannot prepare a model as {name!r}.",
                    "another model has that name",
                    "prepare each model under its own name",
                )
            )
        if make_model is None:
            ingredients = self._configured(name, objective)
        else:
            ingredients = Ingredients(
                name,
                make_model,
                users_optimizer(make_optimizer) if make_optimizer is not None else None,
                users_schedule(make_schedule) if make_schedule is not None else None,
                self._adopt_objective(name, objective),
            )
        if ingredients.make_optimizer is not None:
            if make_optimizer is not None:
                reject_closures(ingredients.make_optimizer, f"The optimizer of {name!r}")
            self._strategy.check_optimizer(ingredients.make_optimizer, self._world.mesh)
        prepared = self._strategy.prepare(ingredients)
        self.by_name[name] = prepared
        return prepared

    def _configured(self, name: str, objective: Any) -> Ingredients:
        config = self._config
        self._datasets.train()  # run.epochs and run.tokens give the number of steps only with the dataset
        make_schedule = None
        if config.schedule is not None:
            if self._datasets.total_steps is None:
                raise ConfigError(
                    explain("Cannot build the schedule.", "the number of the run's steps is not known", "set run.steps")
                )
            make_schedule = build.schedule_factory_of(config, self._datasets.total_steps)
        make_model = build.model_factory(config)
        if config.model is not None and config.model.sync_batch_norm:
            make_model = synchronized(make_model, self._world.mesh.data_group)
        return Ingredients(
            name,
            make_model,
            build.optimizer_factory_of(config),
            make_schedule,
            self._adopt_objective(name, objective if objective is not None else build.objective_of(config)),
        )

    def find(self, name: str) -> Prepared:
        """Return a prepared model. Local. Raises ConfigError for an unknown name."""
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none"
            raise ConfigError(
                explain(f"No model was prepared as {name!r}.", f"prepared models: {known}", "call engine.prepare first")
            )
        return self.by_name[name]

    def objective_for(self, name: str, objective: Any) -> Objective:
        """Return the given objective, else the model's, else the config's. Local. Raises ConfigError."""
        if objective is None:
            if name not in self._objectives:
                self._objectives[name] = build.objective_of(self._config)
            return self._objectives[name]
        known = self._objectives.get(name)
        if known is not None and objective in (known, known.user):
            return known
        found = objective if isinstance(objective, Objective) else Objective(objective)
        if found.module is not None and any(parameter.requires_grad for parameter in found.module.parameters()):
            raise ConfigError(
                explain(
                    f"Cannot train {name!r} for an objective that was not prepared with it.",
                    f"{found!r} has trainable parameters, which no optimizer would train",
                    f"pass it to prepare({name!r}, ..., objective=...)",
                )
            )
        return found

    def _adopt_objective(self, name: str, objective: Any) -> nn.Module | None:
        """Keep a model's objective, and return its module if it is one. Collective where it is a module."""
        if objective is None:
            return None
        adapted = objective if isinstance(objective, Objective) else Objective(objective)
        self._objectives[name] = adapted
        module = adapted.module
        if module is not None:
            check_same_everywhere(self._world, module, f"{name}'s objective")
            module.to(device=self._world.device, dtype=self._world.dtype)
        return module

    def others_frozen(self, name: str) -> AbstractContextManager[Any]:
        """Let gradients flow through the other models while none is collected in them. Local."""
        if len(self.by_name) == 1:
            return nullcontext()
        with ExitStack() as stack:
            for other, prepared in self.by_name.items():
                if other != name and prepared.named:
                    stack.enter_context(self._strategy.frozen(prepared))
            return stack.pop_all()
