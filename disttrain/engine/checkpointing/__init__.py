"""Saves and resumes the state of a run."""
