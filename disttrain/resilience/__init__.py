"""What a run does when something from outside stops it. Enters from the engine; knows no engine."""

from disttrain.resilience.interrupt import Interrupts

__all__ = ["Interrupts"]
