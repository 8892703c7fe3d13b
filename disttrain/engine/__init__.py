"""Runs training: `Engine` for custom loops, `train` for a complete run, `load` for a trained model."""

from disttrain.engine.engine import Engine
from disttrain.engine.loading import load
from disttrain.engine.loop import Run, train

__all__ = ["Engine", "Run", "load", "train"]
