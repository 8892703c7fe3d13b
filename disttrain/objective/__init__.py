"""What a model is trained for: the adapter over users' forms, and the built-in objectives. Enters: strategy, engine."""

from disttrain.objective.objective import Context, Loss, Objective

__all__ = ["Context", "Loss", "Objective"]
