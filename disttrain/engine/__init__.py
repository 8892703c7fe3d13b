"""The engine: composition, the loop, a step's acts, state. Enters: entry points and users' own loops."""

from disttrain.engine.engine import Engine
from disttrain.engine.loading import load
from disttrain.engine.loop import Run, train

__all__ = ["Engine", "Run", "load", "train"]
