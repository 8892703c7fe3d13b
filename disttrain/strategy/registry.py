"""From a strategy's name to the strategy: built-in ones and installed plug-ins alike."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from disttrain.config.strategy_options import strategy_entry
from disttrain.errors import ConfigError, explain
from disttrain.strategy.contract import AbstractStrategy


def strategy_class(name: str) -> type[AbstractStrategy]:
    """The class that `name` stands for. Local; raises ConfigError for what is no strategy."""
    implementation = strategy_entry(name).implementation
    module, _, attribute = implementation.partition(":")
    found: Any = getattr(import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, AbstractStrategy)):
        raise ConfigError(
            explain(
                f"strategy.name={name} names a class that keeps the strategy contract.",
                f"{implementation}, which is {found!r}",
                "derive it from disttrain.strategy.AbstractStrategy",
            )
        )
    return found
