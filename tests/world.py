"""Real worlds for tests, from disttrain.testing.world."""

from disttrain.testing.world import WorldError, free_port, run_world

__all__ = ["WorldError", "free_port", "run_world"]
