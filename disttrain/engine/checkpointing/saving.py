"""Writes a run's checkpoints, at once or in the background while training continues.

Owns the thread that writes, the memory that it writes from, the policy after a failed save, and retention. With saves
in the background the loop waits for a copy only. A save that falls due while another is being written waits for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import replace

from disttrain.checkpoint import Best, Location, PlanCache, Ranks, Retention, ShardCopies, SoleRank
from disttrain.config.schema import CheckpointConfig
from disttrain.engine.checkpointing import snapshot
from disttrain.engine.checkpointing.snapshot import Snapshot
from disttrain.engine.run_log import RunLog
from disttrain.errors import CheckpointError
from disttrain.logs import package_logger
from disttrain.runtime import Group

_log = package_logger("checkpoint")

_TRIES, _PAUSE_S = 3, 1.0
"""The number of attempts of `on_failure: retry`, and the first pause in seconds, which doubles."""
_NICENESS = 10
_LEAVE_S = 10.0
"""How long a failed run waits for a save in the background. It may end in a moment, or its ranks may be gone."""


class Saver:
    """Saves the checkpoints of a run. Methods are collective unless they say Local."""

    def __init__(self, config: CheckpointConfig, log: RunLog, group: Group) -> None:
        self._config, self._log, self._group = config, log, group
        self._root = log.checkpoints.root
        best = Best(**vars(config.best)) if config.best is not None else None
        self._retention = Retention(self._root, config.keep_last, config.keep_every, best)
        self._staging = ShardCopies()
        self._plans = PlanCache()
        self._background_ranks: Ranks | None = None
        self._running: _Background | None = None
        self.saved_at = -1
        """The step of the last checkpoint, including a checkpoint that is still being written."""

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a failed save in the background. Local."""
        return self._running is not None and self._running.error is not None

    @property
    def under_way(self) -> bool:
        """Whether a save is being written in the background. Local."""
        return self._running is not None and self._running.is_alive()

    def found(self, step: int, path: Location) -> None:
        """Remember that the run continues from `path`, one of its intact checkpoints. Local."""
        self.saved_at = step
        if self._group.rank == 0:
            self._retention.mark_intact(path)

    def save(self, taken: Snapshot, *, last: bool = False) -> Location | None:
        """Write a snapshot and return its folder when it is durable; None where it failed and the run continues.

        The caller has waited for the save before it. The `last` save of a run raises its error whatever `on_failure`
        says, because no training continues after it.
        """
        try:
            path = self._commit(taken, self._group)
        except CheckpointError as error:
            self._survive(error, taken.step, last=last)
            return None
        self.saved_at = taken.step
        self._log.committed(taken.step, path)
        return path

    def connect(self) -> None:
        """Connect the ranks for saves in the background, where the config asks for them. Idempotent.

        Called before training. If a rank is killed while the others connect, they wait until the group's timeout. Later
        its closed connection reports the loss at once.
        """
        if self._config.background and self._background_ranks is None:
            self._background_ranks = self._group.background() if self._group.size > 1 else SoleRank()

    def begin(self, taken: Snapshot) -> None:
        """Copy a snapshot, then write the copy in the background."""
        began = time.monotonic()
        if self.under_way:
            assert self._running is not None
            _log.info("step %d waits to be saved: step %d is still being written", taken.step, self._running.step)
        self.wait()
        waited = time.monotonic() - began
        self.connect()
        shards = self._group.together(lambda: self._staging.copy(taken.shards), "copying what is saved")
        assert self._background_ranks is not None, "the config asks for saves in the background"
        self._running = _Background(self, replace(taken, shards=shards), self._background_ranks)
        self._running.start()
        self.saved_at = taken.step
        if waited > 1:
            _log.info("step %d waited %.1f s for the save before it", taken.step, waited)

    def wait(self) -> None:
        """Return when no save is under way. Raises the save's error, unless the run continues without it."""
        running = self._running
        if running is None:
            return
        running.join()
        self.settle()
        if running.error is not None:
            self._running = None
            self.saved_at = -1
            if not isinstance(running.error, CheckpointError):
                raise running.error
            self._survive(running.error, running.step, last=False)

    def settle(self) -> None:
        """Report a save in the background that has succeeded. Local; cheap where there is none."""
        running = self._running
        if running is not None and running.path is not None:
            running.join()
            self._running = None
            self._log.committed(running.step, running.path)

    def close(self) -> None:
        """Wait a moment for a save under way, and report a save that is lost. Local."""
        if self._running is not None:
            self._running.join(_LEAVE_S)
            if self._running.is_alive():
                _log.warning("step %d was still being written and is lost", self._running.step)
            if self._running.error is not None:
                _log.warning("step %d was not saved: %s", self._running.step, self._running.error)
            self.settle()

    def _commit(self, taken: Snapshot, ranks: Ranks) -> Location:
        """Write a snapshot, with further attempts if the policy says so. Then remove checkpoints by retention."""
        first = None
        for tried in range(1, _TRIES + 1):
            try:
                path = snapshot.commit(taken, self._root, ranks, self._plans)
                break
            except CheckpointError as error:
                first = first or error
                if self._config.on_failure != "retry" or tried == _TRIES:
                    raise first from None  # later errors may only report what the first attempt left behind
                pause = _PAUSE_S * 2 ** (tried - 1)
                if ranks.rank == 0:
                    _log.warning("attempt %d of %d in %g s: %s", tried + 1, _TRIES, pause, error)
                time.sleep(pause)
        if ranks.rank == 0:
            self._retention.committed(path)
        return path

    def _survive(self, error: CheckpointError, step: int, *, last: bool) -> None:
        if self._config.on_failure != "go_on" or last:
            raise error
        self._log.incident("checkpoint", step=step, error=str(error))


class _Background(threading.Thread):
    """One save. When the thread has ended, `path` or `error` is set."""

    def __init__(self, saver: Saver, taken: Snapshot, ranks: Ranks) -> None:
        super().__init__(name=f"save-{taken.step}", daemon=True)
        self._saver, self._taken, self._ranks = saver, taken, ranks
        self.step = taken.step
        self.path: Location | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            _lower_priority()
            self.path = self._saver._commit(self._taken, self._ranks)
        except BaseException as error:  # noqa: BLE001 - `wait` raises it in the loop's thread
            self.error = error


def _lower_priority() -> None:
    """Give training the processor first. Linux has priorities of single threads; elsewhere nothing changes."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
        with contextlib.suppress(OSError):  # optional, and some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, thread, lower)
