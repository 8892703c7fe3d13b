"""Models, and how any model comes by its first values. Enters: strategy, engine, cli."""

from disttrain.model.initialize import build_model, fill, fill_self, says_how

__all__ = ["build_model", "fill", "fill_self", "says_how"]
