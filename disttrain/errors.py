"""Defines every error that disttrain raises on purpose, and the exit codes of `disttrain.run`.

The errors form one tree, split by who can fix the problem. `explain` builds their messages from three parts: what
failed, the problem with its actual values, and the fix. This module imports nothing from disttrain.

Exit codes:

=====  ==========================================================================
 code  meaning
=====  ==========================================================================
    0  The run finished.
    1  An unexpected error in disttrain or in user code.
    2  `ConfigError`
    3  `LaunchError`
    4  `DataError`
    5  `CheckpointError`
    6  `TrainingError`
    7  Reserved: a rank hung. Nothing returns it yet.
   75  Reserved: preempted and saved, run the same command again. Nothing returns
       it yet.
  130  Interrupted by Ctrl-C (SIGINT).
=====  ==========================================================================
"""

from __future__ import annotations

FINISHED = 0
INTERRUPTED = 130


class DisttrainError(Exception):
    """The base class of all errors that disttrain raises on purpose.

    Attributes:
        exit_code: the exit code of `disttrain.run` after this error.
    """

    exit_code = 1


class ConfigError(DisttrainError):
    """The config, or an argument that overrides it, is invalid. The author of the config can fix it."""

    exit_code = 2


class LaunchError(DisttrainError):
    """The launch or the environment is wrong. The person who started the processes can fix it."""

    exit_code = 3


class DataError(DisttrainError):
    """The data cannot be read or does not fit the config. The author of the dataset can fix it."""

    exit_code = 4


class CheckpointError(DisttrainError):
    """A checkpoint or a run's folder cannot be written, read or resumed."""

    exit_code = 5


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing or differ from its manifest. A run continues from an older checkpoint."""


class UnreadableError(CheckpointError):
    """This program or this user cannot read a checkpoint that may be intact.

    It is not a reason to continue from an older checkpoint.
    """


class TrainingError(DisttrainError):
    """Training itself failed: a loss that is not finite, for example."""

    exit_code = 6


def explain(failed: str, problem: str, fix: str) -> str:
    """Build an error message of three lines: what failed, the problem with its actual values, and the fix."""
    return f"{failed}\n  problem: {problem}\n  fix: {fix}"
