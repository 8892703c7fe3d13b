"""Finds the class of a strategy, built-in or plug-in, by its name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from disttrain.config.strategy_options import strategy_entry
from disttrain.errors import ConfigError, explain
from disttrain.strategy.contract import AbstractStrategy


def strategy_class(name: str) -> type[AbstractStrategy]:
    """Return the class of the strategy `name`. Local. Raises ConfigError where it is no strategy."""
    implementation = strategy_entry(name).implementation
    module, _, attribute = implementation.partition(":")
    found: Any = getattr(import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, AbstractStrategy)):
        raise ConfigError(
            explain(
                f"Cannot use strategy {name}.",
                f"its plug-in names {implementation}, which is {found!r} and no strategy",
                "derive the class from disttrain.strategy.AbstractStrategy",
            )
        )
    return found
