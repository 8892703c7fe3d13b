"""Resolves a `target` to the object it names, and checks targets without importing user code."""
