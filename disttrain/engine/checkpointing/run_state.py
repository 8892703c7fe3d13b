"""A run's state: where it stands, what is saved of it and when, where it goes on from, and how it ended.

Owns the `Progress`, the tracked objects and the hand on checkpoints; `Engine` enters it between steps. Methods are
collective unless they say local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from disttrain.checkpoint import Checkpoint, Differences, Location
from disttrain.config import Config
from disttrain.engine.checkpointing import restoring, snapshot
from disttrain.engine.checkpointing.frozen_parameters import Base
from disttrain.engine.checkpointing.random_state import OWNER
from disttrain.engine.checkpointing.restoring import Restoring
from disttrain.engine.checkpointing.saving import Saver
from disttrain.engine.checkpointing.snapshot import Parts, Progress, Snapshot, Tracked
from disttrain.engine.datasets import Datasets
from disttrain.engine.run_log import Record
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.strategy import AbstractStrategy, Prepared, World


class RunState:
    """Of one run in one process. `prepared` and `datasets` are the engine's own and grow with it."""

    def __init__(
        self,
        config: Config,
        world: World,
        strategy: AbstractStrategy,
        record: Record,
        datasets: Datasets,
        prepared: Mapping[str, Prepared],
    ) -> None:
        self._checkpoint = config.checkpoint
        self._record, self._datasets = record, datasets
        self._tracked: dict[str, Tracked] = {}
        self._parts = Parts(config, world, strategy, prepared, self._tracked, Base())
        self.saver = Saver(config.checkpoint, record, world.group)
        self.progress = Progress()
        self.within_step = False
        """Whether weights have been stepped and the step is not counted yet: nothing is saved of such a moment."""
        self._spoilt = False
        self.begun = False
        """Whether the run has been resumed, or has begun."""
        self.ended: str | None = None
        """How the run ended in this process: finished or preempted."""

    @property
    def finished(self) -> bool:
        """Whether the run's steps are done. Local."""
        total = self._datasets.total_steps
        return total is not None and self.progress.steps >= total

    @property
    def was_finished(self) -> bool:
        """Whether the run had come to its end before this process began. Local."""
        return self.begun and self._record.was_finished(self._datasets.total_steps)

    def track(self, name: str, thing: Any, *, per_rank: bool) -> None:
        """Save and restore `thing` too. Local."""
        if name == OWNER:
            raise ConfigError(explain(f"track({name!r})", "a name that the engine uses itself", "take another"))
        self._tracked[name] = Tracked(thing, per_rank)

    # ------------------------------------------------------------------ saving

    @property
    def unsaved(self) -> bool:
        """Whether this step has no checkpoint, and may have one. Local."""
        return self.progress.steps not in (0, self.saver.saved_at)

    def snapshot(self) -> Snapshot:
        """What a checkpoint of this step holds, by reference."""
        self.refuse_spoilt()
        return snapshot.take(self._parts, self.progress, self._record.evaluation_of(self.progress.steps))

    def save(self) -> Location | None:
        """Write a checkpoint of this step, unless it has one; None then, and where it failed and the run goes on."""
        self._refuse_within_step()
        self.saver.wait()
        return self.saver.save(self.snapshot()) if self.unsaved else None

    def save_due(self) -> None:
        """Like `save`; with `checkpoint.background` it returns when all is copied that will be written."""
        self._refuse_within_step()
        if self._checkpoint.background and self.unsaved:
            self.saver.begin(self.snapshot())
        else:
            self.save()

    def _refuse_within_step(self) -> None:
        if self.within_step:
            found = "engine.step, and no engine.log after it"
            raise ConfigError(explain("A checkpoint is to be saved.", found, "call it"))

    # ------------------------------------------------------------------ loading

    def resume(self) -> None:
        """Go on from the run's own newest whole checkpoint, else from `checkpoint.resume`'s path, else from nothing."""
        with self._restoring() as state:
            found = self._record.find_checkpoint(state.fill)
            if found is not None:
                self._finish_restoring(state, found)
                self._record.resumed(self.progress, found.path)
        self.begun = True

    def begin(self) -> None:
        """After `resume`: all is there that training needs, and the record of this part of the run is open."""
        if self.was_finished:
            self.progress.steps = int(self._record.earlier["step"])  # there may be no checkpoint of it to resume
        else:
            self.saver.meet()
            self._record.started(self.progress, self._datasets.total_steps, self._parts.prepared)

    def load(self, path: str | Location) -> None:
        """Everything from a run's newest whole checkpoint, or from the one named; before the loop begins."""
        if self.begun:
            raise ConfigError(
                explain(f"load({str(path)!r})", "a loop that has begun", "load before the first batch, in a new Engine")
            )
        with self._restoring() as state:
            self._finish_restoring(state, self._record.open_checkpoint(path))

    @contextmanager
    def _restoring(self) -> Iterator[Restoring]:
        self.refuse_spoilt()
        state = Restoring(self._parts)
        try:
            yield state
        except BaseException:
            self._spoilt = state.touched
            raise

    def refuse_spoilt(self) -> None:
        """Raise CheckpointError where models hold parts of a checkpoint that could not be restored. Local."""
        if self._spoilt:
            found = "weights and optimizer state that were partly read from a checkpoint, which then failed"
            do = "mend what was wrong with it, and make a new Engine, whose models are built anew"
            raise CheckpointError(explain("The engine is to go on.", found, do))

    def _finish_restoring(self, state: Restoring, found: Checkpoint) -> None:
        self.progress = state.finish(found)
        if found.path.parent.resolve() == self._record.checkpoints.resolve():
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
        """Only one prepared model's weights, from whatever has them."""
        found = restoring.load_weights(self._parts, name, path, strict=strict, only=only, rename=rename)
        self._record.weights_loaded(path, found)
        return found

    def load_for_evaluation(self, name: str, path: str | Location) -> None:
        """One prepared model's weights, its objective's, and where its draws stand."""
        restoring.load_for_evaluation(self._parts, name, self._record.open_checkpoint(path))

    # ------------------------------------------------------------------ the end

    def finish(self, *, stopped: bool) -> str:
        """The last save, status and plot; returns `finished`, or `preempted` where it was `stopped` before its end."""
        if self.ended is None:
            if self.was_finished:
                self.ended = self._record.finished_before()
            else:
                self.saver.wait()
                if (self._checkpoint.at_end or stopped) and self.unsaved:
                    self._refuse_within_step()
                    self.saver.save(self.snapshot(), last=True)
                self.ended = self._record.finished(self.progress, interrupted=stopped and not self.finished)
        return self.ended
