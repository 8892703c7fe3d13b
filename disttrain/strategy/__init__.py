"""Strategies: how a model is spread over the ranks. Siblings behind one contract. Enters: the engine."""

from disttrain.strategy.contract import (
    AbstractStrategy,
    Ingredients,
    Prepared,
    StepOutcome,
    StepSums,
    World,
)
from disttrain.strategy.registry import strategy_class

__all__ = ["AbstractStrategy", "Ingredients", "Prepared", "StepOutcome", "StepSums", "World", "strategy_class"]
