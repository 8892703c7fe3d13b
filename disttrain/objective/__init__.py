"""Provides the built-in objectives, and the adapter that gives every user's objective the same interface."""

from disttrain.objective.language import NextToken
from disttrain.objective.objective import Context, Loss, Number, Objective
from disttrain.objective.supervised import MSE, CrossEntropy

__all__ = ["MSE", "Context", "CrossEntropy", "Loss", "NextToken", "Number", "Objective"]
