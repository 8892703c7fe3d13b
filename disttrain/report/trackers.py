"""Where a run's numbers go besides metrics.jsonl: anything with `log` and `close`.

Owns the protocol and the TensorBoard tracker. A tracker may fail: the reporter then goes on without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from disttrain.errors import ConfigError, explain


class Tracker(Protocol):
    """What `report.trackers` may name. Made and called on rank 0 only, at reported steps and evaluations.

    A tracker's target is called with its own arguments and `run_folder`, the path of the run's folder.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step; keys are those of metrics.jsonl."""

    def close(self) -> None:
        """Write what is held back; nothing is logged afterwards."""


class TensorBoardTracker:
    """Scalars in `RUN/tensorboard/`. Raises ConfigError where the package is not installed."""

    def __init__(self, run_folder: Path | str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                explain(
                    "report.trackers names tensorboard.",
                    f"it cannot be imported: {error}",
                    "pip install tensorboard, or take it off the list",
                )
            ) from error
        self._folder = Path(run_folder) / "tensorboard"
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a value, under the key of metrics.jsonl."""
        if self._writer is None:
            # What an unsaved past logged from here on is hidden in TensorBoard's view, not shown as a second curve.
            self._writer = self._make(str(self._folder), purge_step=step)
        for key, value in values.items():
            self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def close(self) -> None:
        """Flush and let go of the file."""
        if self._writer is not None:
            self._writer.close()
