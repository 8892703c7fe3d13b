"""Handles interruptions of a run from outside. Used by the engine."""

from disttrain.resilience.interrupt import Interrupts

__all__ = ["Interrupts"]
