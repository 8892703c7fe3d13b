"""What a model is trained for: the adapter over users' forms, and the built-in objectives. Enters: strategy, engine."""

from disttrain.objective.language import NextToken
from disttrain.objective.objective import Context, Loss, Number, Objective
from disttrain.objective.supervised import MSE, CrossEntropy

__all__ = ["MSE", "Context", "CrossEntropy", "Loss", "NextToken", "Number", "Objective"]
