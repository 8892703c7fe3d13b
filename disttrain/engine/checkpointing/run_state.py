"""Holds a run's progress, and saves, restores and ends the run. `Engine` calls it between steps.

Methods are collective unless they say Local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from disttrain.checkpoint import Checkpoint, Differences, Location
from disttrain.config import Config
from disttrain.engine.checkpointing import restoring, snapshot
from disttrain.engine.checkpointing.random_state import OWNER
from disttrain.engine.checkpointing.restoring import Restoring
from disttrain.engine.checkpointing.saving import Saver
from disttrain.engine.checkpointing.snapshot import Parts, Progress, Snapshot, Tracked
from disttrain.engine.datasets import Datasets
from disttrain.engine.run_log import RunLog
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.strategy import AbstractStrategy, Prepared, World


class RunState:
    """The state of one run in one process. `prepared` and `datasets` belong to the engine and grow with it."""

    def __init__(
        self,
        config: Config,
        world: World,
        strategy: AbstractStrategy,
        log: RunLog,
        datasets: Datasets,
        prepared: Mapping[str, Prepared],
    ) -> None:
        self._checkpoint = config.checkpoint
        self._log, self._datasets = log, datasets
        self._tracked: dict[str, Tracked] = {}
        self._parts = Parts(config, world, strategy, prepared, self._tracked)
        self.saver = Saver(config.checkpoint, log, world.group)
        self.progress = Progress()
        self.within_step = False
        """Whether weights were stepped and the step is not counted yet. Nothing is saved at such a moment."""
        self.stopped = False
        """Whether any rank was asked to stop."""
        self._partly_restored = False
        self.started = False
        """Whether the run has resumed or started from scratch."""
        self.ended: str | None = None
        """How the run ended in this process: finished or interrupted."""

    @property
    def finished(self) -> bool:
        """Whether the run's steps are done. Local."""
        total = self._datasets.total_steps
        return total is not None and self.progress.steps >= total

    @property
    def was_finished(self) -> bool:
        """Whether the run had finished before this process started. Local."""
        return self.started and self._log.was_finished(self._datasets.total_steps)

    def track(self, name: str, thing: Any, *, per_rank: bool) -> None:
        """Save and restore `thing` too. Local."""
        if name == OWNER:
            raise ConfigError(
                explain(f"Cannot track an object as {name!r}.", "the engine uses that name", "choose another name")
            )
        self._tracked[name] = Tracked(thing, per_rank)

    # ------------------------------------------------------------------ saving

    @property
    def unsaved(self) -> bool:
        """Whether this step has no checkpoint yet and can have one. Local."""
        return self.progress.steps not in (0, self.saver.saved_at)

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint of this step contains. It refers to live tensors."""
        self.reject_partly_restored()
        return snapshot.take(self._parts, self.progress, self._log.evaluation_of(self.progress.steps))

    def save(self) -> Location | None:
        """Write a checkpoint of this step. Returns None if it has one, or if the save failed and the run continues."""
        self._reject_within_step()
        self.saver.wait()
        return self.saver.save(self.snapshot()) if self.unsaved else None

    def save_due(self) -> None:
        """Write a checkpoint that is due. With `checkpoint.background`, return when everything has been copied."""
        self._reject_within_step()
        if self._checkpoint.background and self.unsaved:
            self.saver.begin(self.snapshot())
        else:
            self.save()

    def _reject_within_step(self) -> None:
        if self.within_step:
            raise ConfigError(
                explain(
                    "Cannot save a checkpoint between engine.step and engine.log.",
                    "engine.step was called without engine.log after it",
                    "call engine.log first",
                )
            )

    # ------------------------------------------------------------------ loading

    def resume(self) -> None:
        """Continue from the run's newest intact checkpoint, else from `checkpoint.resume`'s path, else from scratch."""
        with self._restoring() as state:
            found = self._log.checkpoints.find(state.fill)
            if found is not None:
                self._finish_restoring(state, found)
                self._log.resumed(self.progress, found.path)
        self.started = True

    def start(self) -> None:
        """Open the log of this part of the run, after `resume`."""
        if self.was_finished:
            self.progress.steps = int(self._log.earlier["step"])  # there may be no checkpoint of it to resume
        else:
            self.saver.connect()
            self._log.started(self.progress, self._datasets.total_steps, self._parts.prepared)

    def load(self, path: str | Location) -> None:
        """Restore everything from a run's newest intact checkpoint, or from one checkpoint, before the first batch."""
        if self.started:
            raise ConfigError(
                explain(
                    f"Cannot load {path} now.",
                    "the loop has started",
                    "load before the first batch, in a new Engine",
                )
            )
        with self._restoring() as state:
            self._finish_restoring(state, self._log.checkpoints.open(path))

    @contextmanager
    def _restoring(self) -> Iterator[Restoring]:
        self.reject_partly_restored()
        state = Restoring(self._parts)
        try:
            yield state
        except BaseException:
            self._partly_restored = state.touched
            raise

    def reject_partly_restored(self) -> None:
        """Raise CheckpointError where models hold parts of a checkpoint that could not be restored. Local."""
        if self._partly_restored:
            raise CheckpointError(
                explain(
                    "This engine cannot continue.",
                    "weights and optimizer state were partly read from a checkpoint, which then failed",
                    "fix the cause and create a new Engine, which builds its models again",
                )
            )

    def _finish_restoring(self, state: Restoring, found: Checkpoint) -> None:
        self.progress = state.finish(found)
        if self._log.checkpoints.holds(found.path):
            self.saver.found(self.progress.steps, found.path)

    def load_weights(
        self,
        name: str,
        path: str | Location,
        *,
        strict: bool,
        only: Sequence[str] = (),
        rename: Callable[[str], str] | None = None,
    ) -> Differences:
        """Load one prepared model's weights alone, from weights in any format."""
        found = restoring.load_weights(self._parts, name, path, strict=strict, only=only, rename=rename)
        self._log.weights_loaded(path, found)
        return found

    def load_for_evaluation(self, name: str, path: str | Location) -> None:
        """Load one prepared model's weights, its objective's, and the key of its random numbers."""
        restoring.load_for_evaluation(self._parts, name, self._log.checkpoints.open(path))

    # ------------------------------------------------------------------ the end

    def finish(self, *, stopped: bool) -> str:
        """Save once more, write status and plot. Returns `interrupted` if `stopped` before its end, else `finished`."""
        if self.ended is None:
            if self.was_finished:
                self.ended = self._log.finished_before()
            else:
                self.saver.wait()
                if (self._checkpoint.at_end or stopped) and self.unsaved:
                    self._reject_within_step()
                    self.saver.save(self.snapshot(), last=True)
                total = self._datasets.total_steps
                self.ended = self._log.finished(self.progress, total, interrupted=stopped and not self.finished)
        return self.ended
