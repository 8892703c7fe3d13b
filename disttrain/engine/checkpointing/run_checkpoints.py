"""Finds the checkpoint that a run continues from, sets damaged checkpoints aside, and opens checkpoints of other runs.

When checkpoints are written is decided in `saving`. What goes into a checkpoint is decided in `snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from disttrain.checkpoint import Checkpoint, Location, newest_intact, reject_unwritable, remove_stale_staging, set_aside
from disttrain.config.schema import CheckpointConfig
from disttrain.engine.checkpointing.locate import open_newest_together
from disttrain.errors import CheckpointError, explain
from disttrain.logs import package_logger
from disttrain.report import RunFolder
from disttrain.runtime import Group

_log = package_logger("checkpoint")


class RunCheckpoints:
    """The checkpoints of one run, at `root`, and those that it may start from. Collective unless stated."""

    def __init__(self, root: Location, config: CheckpointConfig, folder: RunFolder, group: Group) -> None:
        self.root = root
        self._resume, self._folder, self._group = config.resume, folder, group

    def separate_folder(self) -> RunFolder | None:
        """Return the folder in `checkpoint.storage`, which other runs could name too; None without one. Local."""
        root = self.root
        return RunFolder(root) if isinstance(root, Path) and root != self._folder.checkpoints else None

    def reject_existing_run(self) -> None:
        """Raise CheckpointError where `checkpoint.resume` is never, although the folder holds a run. Local."""
        if self._resume == "never":
            self._reject_restart(f"{self._folder.path} holds a run already", "remove the folder")

    def make_ready(self) -> None:
        """Check that checkpoints can be written, and remove what a killed save left behind. Local."""
        reject_unwritable(self.root)
        remove_stale_staging(self.root)

    def find(self, fill: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Return the run's newest intact checkpoint, else that of `checkpoint.resume=PATH`, else None.

        `fill` reads each candidate and raises DamagedError for a damaged one. Damaged checkpoints are set aside.
        """
        never = self._resume == "never"
        found, rejected = newest_intact(self.root, self._group, None if never else fill)
        if rejected and found is None:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in rejected[:3])
            raise CheckpointError(
                explain(
                    f"Cannot continue the run in {self._folder.path}.",
                    f"none of its checkpoints is intact: {reasons}",
                    f"repair one, or move them out of {self.root}: the run then restarts from scratch",
                )
            )
        if rejected:
            main = self._group.rank == 0
            self._group.together(lambda: self._set_aside(rejected) if main else None, "setting checkpoints aside")
        if found is not None and never:  # in a storage: the run's folder is new
            self._reject_restart(f"{self.root} holds a run's checkpoints already", "remove them")
        if found is None and self._resume not in ("auto", "never"):
            return self.open(self._resume)
        return found

    def open(self, path: str | Location) -> Checkpoint:
        """Open a checkpoint of any run, the same on every rank."""
        return open_newest_together(path, self._group)

    def holds(self, path: Location) -> bool:
        """Return whether `path` is a checkpoint of this run. Local."""
        return path.parent.resolve() == self.root.resolve()

    def _set_aside(self, rejected: Sequence[tuple[Location, str]]) -> None:
        for path, reason in rejected:
            aside = set_aside(path)
            _log.warning("%s is damaged and was set aside as %s: %s", path.name, aside.name, reason)
            self._folder.append_ledger("checkpoint_rejected", path=str(path), reason=reason)

    def _reject_restart(self, problem: str, remove: str) -> None:
        raise CheckpointError(
            explain(
                "checkpoint.resume=never cannot start this run from scratch.",
                problem,
                f"set another run.name, {remove}, or set checkpoint.resume=auto",
            )
        )
