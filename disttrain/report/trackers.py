"""Defines trackers, which receive a run's numbers in addition to metrics.jsonl, and the TensorBoard tracker.

A tracker may fail: the reporter then continues without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from disttrain.errors import ConfigError, explain


class Tracker(Protocol):
    """The interface of the targets in `report.trackers`. Built and called on rank 0 only.

    A tracker's target is called with its arguments and `run_folder`, the path of the run's folder.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the numbers of a reported step or an evaluation. The keys are those of metrics.jsonl."""

    def close(self) -> None:
        """Write everything that is buffered. `log` is not called afterwards."""


class TensorBoardTracker:
    """Writes scalars to `RUN/tensorboard/`. Raises ConfigError where the package is not installed."""

    def __init__(self, run_folder: Path | str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                explain(
                    "Cannot build the tracker tensorboard of report.trackers.",
                    f"tensorboard cannot be imported: {error}",
                    "run pip install tensorboard, or remove it from the list",
                )
            ) from error
        self._folder = Path(run_folder) / "tensorboard"
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar for each value, under the key of metrics.jsonl."""
        if self._writer is None:
            # TensorBoard hides what steps that were never saved logged from here on, instead of a second curve.
            self._writer = self._make(str(self._folder), purge_step=step)
        for key, value in values.items():
            self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
