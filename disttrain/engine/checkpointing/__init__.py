"""Saves and resumes runs: what a checkpoint of a run contains, when it is written, and how it is restored."""
