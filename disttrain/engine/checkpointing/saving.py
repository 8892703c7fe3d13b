"""When and how a run's checkpoints are written: at once, or in the background while training goes on.

Owns the thread that writes, the memory it writes from, what happens when a save fails, and what is kept after one. The
loop waits for a copy only; a save that falls due while another is being written waits for that one.
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
from disttrain.engine.run_log import Record
from disttrain.errors import CheckpointError
from disttrain.logs import package_logger
from disttrain.runtime import Group

_log = package_logger("checkpoint")

_TRIES, _PAUSE_S = 3, 1.0
"""How often `on_failure: retry` tries in all, and the first pause, which doubles."""
_NICENESS = 10
_LEAVE_S = 10.0
"""How long a failed run waits for a save in the background: it may be whole in a moment, or its ranks may be gone."""


class Saver:
    """A run's hand on its checkpoints. Methods are collective unless they say local."""

    def __init__(self, config: CheckpointConfig, record: Record, group: Group) -> None:
        self._config, self._record, self._group = config, record, group
        best = Best(**vars(config.best)) if config.best is not None else None
        self._retention = Retention(record.checkpoints, config.keep_last, config.keep_every, best)
        self._staging = ShardCopies()
        self._plans = PlanCache()
        self._beside: Ranks | None = None
        self._running: _Background | None = None
        self.saved_at = -1
        """The step of the last checkpoint, be it still on its way."""

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a save in the background failed. Local."""
        return self._running is not None and self._running.error is not None

    @property
    def under_way(self) -> bool:
        """Whether a save is being written in the background. Local."""
        return self._running is not None and self._running.is_alive()

    def found(self, step: int, path: Location) -> None:
        """The run goes on from this whole checkpoint of its own. Local."""
        self.saved_at = step
        if self._group.rank == 0:
            self._retention.mark_intact(path)

    def save(self, taken: Snapshot, *, last: bool = False) -> Location | None:
        """Write a snapshot and return when it is durable; None where it failed and the run goes on without.

        Nothing is under way: the caller has waited. The `last` of a run has nothing to go on to: it raises whatever
        `on_failure` says.
        """
        try:
            path = self._commit(taken, self._group)
        except CheckpointError as error:
            self._survive(error, taken.step, last=last)
            return None
        self.saved_at = taken.step
        self._record.committed(taken.step, path)
        return path

    def meet(self) -> None:
        """Connect the ranks on the way that saves in the background take, if there will be any. Idempotent.

        Before training: a rank that is killed meanwhile would be waited for until the group's timeout, where afterwards
        its closed connection tells of it at once.
        """
        if self._config.background and self._beside is None:
            self._beside = self._group.background() if self._group.size > 1 else SoleRank()

    def begin(self, taken: Snapshot) -> None:
        """Copy a snapshot and write it in the background."""
        began = time.monotonic()
        if self.under_way:
            assert self._running is not None
            _log.info("step %d waits to be saved: step %d is still being written", taken.step, self._running.step)
        self.wait()
        waited = time.monotonic() - began
        self.meet()
        shards = self._group.together(lambda: self._staging.copy(taken.shards), "copying what is saved")
        assert self._beside is not None, "asked for saves in the background"
        self._running = _Background(self, replace(taken, shards=shards), self._beside)
        self._running.start()
        self.saved_at = taken.step
        if waited > 1:
            _log.info("step %d waited %.1f s for the save before it", taken.step, waited)

    def wait(self) -> None:
        """Return when no save is under way; raises what it raised, unless the run is to go on without it."""
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
        """Tell of a save in the background that has ended well. Local; cheap where there is none."""
        running = self._running
        if running is not None and running.path is not None:
            running.join()
            self._running = None
            self._record.committed(running.step, running.path)

    def close(self) -> None:
        """Leave: a save under way gets a moment to end. Local."""
        if self._running is not None:
            self._running.join(_LEAVE_S)
            if self._running.is_alive():
                _log.warning("step %d was still being written and is lost", self._running.step)
            if self._running.error is not None:
                _log.warning("step %d was not saved: %s", self._running.step, self._running.error)
            self.settle()

    def _commit(self, taken: Snapshot, ranks: Ranks) -> Location:
        """Write, again if that is the policy; then let go of what need not be kept."""
        root, first = self._record.checkpoints, None
        for tried in range(1, _TRIES + 1):
            try:
                path = snapshot.commit(taken, root, ranks, self._plans)
                break
            except CheckpointError as error:
                first = first or error
                if self._config.on_failure != "retry" or tried == _TRIES:
                    raise first from None  # what comes after it may only say that something was left behind
                pause = _PAUSE_S * 2 ** (tried - 1)
                if ranks.rank == 0:
                    _log.warning("try %d of %d in %g s: %s", tried + 1, _TRIES, pause, error)
                time.sleep(pause)
        if ranks.rank == 0:
            self._retention.committed(path)
        return path

    def _survive(self, error: CheckpointError, step: int, *, last: bool) -> None:
        if self._config.on_failure != "go_on" or last:
            raise error
        self._record.incident("checkpoint", step=step, error=str(error))


class _Background(threading.Thread):
    """One save. When it has ended, `path` or `error` says how."""

    def __init__(self, saver: Saver, taken: Snapshot, ranks: Ranks) -> None:
        super().__init__(name=f"save-{taken.step}", daemon=True)
        self._saver, self._taken, self._ranks = saver, taken, ranks
        self.step = taken.step
        self.path: Location | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            _give_way()
            self.path = self._saver._commit(self._taken, self._ranks)
        except BaseException as error:  # noqa: BLE001 - raised in the loop's thread, by `wait`
            self.error = error


def _give_way() -> None:
    """Let training have the processor first. On Linux priorities are a thread's own; elsewhere they stay."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
        with contextlib.suppress(OSError):  # it is a courtesy, and some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, thread, lower)
