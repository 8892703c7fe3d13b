"""Reads a checkpoint and verifies every chunk it uses."""
