"""Runs training: `Engine` for custom loops, `train` for a complete run, `load` for a trained model.

The public names are loaded on first use: a command that reads checkpoints needs one small module of this package, and
starts in half the time without the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.engine.engine import Engine as Engine
    from disttrain.engine.loading import load as load
    from disttrain.engine.loop import Run as Run
    from disttrain.engine.loop import train as train

__all__ = ["Engine", "Run", "load", "train"]

_MODULES = {"Engine": "engine", "Run": "loop", "load": "loading", "train": "loop"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
