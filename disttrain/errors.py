"""The one error tree, split by who mends it.

Owns the exit codes of `disttrain.run`. Every message says what was asked, what was found and what to do;
`explain` puts the three together. Nothing below this floor; everything above may raise these.
"""

from __future__ import annotations

FINISHED = 0
PREEMPTED = 75
INTERRUPTED = 130


class DisttrainError(Exception):
    """Base of all errors that disttrain raises on purpose. `exit_code` is what `disttrain.run` ends with."""

    exit_code = 1


class ConfigError(DisttrainError):
    """The config (or an argument that stands in for it) cannot be honoured: its author mends it."""

    exit_code = 2


class LaunchError(DisttrainError):
    """The launch or the environment is wrong: whoever started the processes mends it."""

    exit_code = 3


class DataError(DisttrainError):
    """The data cannot be read or does not fit: whoever made the dataset mends it."""

    exit_code = 4


class CheckpointError(DisttrainError):
    """A checkpoint or a run's folder cannot be written, read or joined."""

    exit_code = 5


class DamagedError(CheckpointError):
    """Files of a checkpoint are not there, or their bytes do not fit its manifest: a run goes on from an older one."""


class UnreadableError(CheckpointError):
    """A checkpoint that may well be whole, and that this program or this user cannot read: no reason to go on from an
    older one."""


class TrainingError(DisttrainError):
    """Training itself went wrong: a loss that is not finite and the like."""

    exit_code = 6


def explain(asked: str, found: str, do: str) -> str:
    """One message in three lines: what was asked, what was found, what to do."""
    return f"{asked}\n  found: {found}\n  to do: {do}"
