"""Finds, compares and removes the checkpoints of a run."""
