"""Writes a checkpoint from all ranks and commits it atomically."""
