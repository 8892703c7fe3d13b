"""Compares one config under many strategies and world sizes with a plain loop, and explains differences."""
