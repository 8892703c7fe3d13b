"""Reads checkpoints and verifies every chunk that it uses."""
