"""Provides the part of `Engine` that starts, saves, resumes and ends a run, and reports whose failure ended it."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.checkpoint import Differences, Location
from disttrain.config import Config, load_config
from disttrain.data import is_lost_worker, lost_worker
from disttrain.engine import build
from disttrain.engine.checkpointing.run_state import RunState
from disttrain.engine.checkpointing.snapshot import Progress
from disttrain.engine.datasets import Datasets
from disttrain.engine.prepared_models import PreparedModels
from disttrain.engine.run_log import RunLog
from disttrain.errors import INTERRUPTED, DisttrainError, LaunchError, explain
from disttrain.launch.accelerate import settle_strategy
from disttrain.logs import DefaultLogs
from disttrain.resilience import Interrupts
from disttrain.runtime import Group, OtherRankError
from disttrain.runtime.leaving import leave_in_time
from disttrain.strategy import Prepared

_WAIT_S = 2.0
"""How long a rank whose peer went away waits for the reason, which the peer reports before it leaves."""


class Session:
    """One run in one process, from its start to its end. `Engine` adds the acts of training."""

    def __init__(self, config: Config | Mapping[str, Any] | str | Path, overrides: Any, *, logs: bool) -> None:
        self.config = settle_strategy(load_config(config, overrides))
        launch = build.find_launch()
        with ExitStack() as undo:  # if this raises, nobody gets an engine to close
            self._logs = undo.enter_context(DefaultLogs(rank=launch.rank, wanted=logs))
            self.plan = build.plan_run(self.config, launch)
            self.world = build.start_world(self.plan)
            undo.callback(self.world.group.close)
            self._interrupts = undo.enter_context(Interrupts())
            self.strategy = self.plan.strategy(self.config.strategy.options, self.world)
            self.run_log = RunLog(self.config, self.plan, self.world.group)
            undo.pop_all()
        self._datasets = Datasets(self.config, self.world)
        self._models = PreparedModels(self.config, self.world, self.strategy, self._datasets)
        self._prepared = self._models.by_name
        self._state = RunState(self.config, self.world, self.strategy, self.run_log, self._datasets, self._prepared)
        atexit.register(self._leave)

    # ------------------------------------------------------------------ identity

    @property
    def rank(self) -> int:
        """The rank of this process. Local."""
        return self.world.group.rank

    @property
    def world_size(self) -> int:
        """The number of processes. Local."""
        return self.world.group.size

    @property
    def device(self) -> torch.device:
        """The device of this rank. Local."""
        return self.world.device

    @property
    def folder(self) -> Path:
        """The run's folder, `run.dir/run.name`. Local."""
        return self.run_log.folder.path

    @property
    def progress(self) -> Progress:
        """The run's steps, samples, tokens and positions in the data so far. Local."""
        return self._state.progress

    @property
    def total_steps(self) -> int | None:
        """The number of optimizer steps of the complete run, None where a custom loop decides. Local."""
        return self._datasets.total_steps

    def finished(self) -> bool:
        """Return whether the run's steps are done. Local."""
        return self._state.finished

    @property
    def was_finished(self) -> bool:
        """Whether the run had finished before this process started. Local."""
        return self._state.was_finished

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C asked any rank to stop. Local."""
        return self._state.stopped

    # ------------------------------------------------------------------ state

    def track(self, name: str, thing: Any, *, per_rank: bool = False) -> None:
        """Save and restore an object with every checkpoint. Local; call it on all ranks, before the first batch.

        Args:
            name: the object's name in checkpoints.
            thing: has `state_dict` and `load_state_dict`, over JSON values and tensors. DTensors are saved by each
                rank's part.
            per_rank: whether each rank has its own state. A rank then gets back what it saved, and keeps its current
                state if it did not exist when the checkpoint was saved. Otherwise the state is equal on all ranks.

        Raises:
            ConfigError: the engine uses that name.
        """
        self._state.track(name, thing, per_rank=per_rank)

    def save(self) -> Location | None:
        """Write a checkpoint of this step and return its folder when it is durable. Collective.

        Returns None if this step has a checkpoint already, or if the save failed and `checkpoint.on_failure` is
        `go_on`. Waits for a save in the background. A batch that was taken and not yet logged is taken again after a
        resume.

        Raises:
            ConfigError: called between `step` and `log`, where weights and step do not belong together.
            CheckpointError: the checkpoint cannot be written. Raised on every rank.
            TrainingError: the weights are not finite.
        """
        return self._state.save()

    def resume(self) -> None:
        """Continue from the run's newest intact checkpoint, else from `checkpoint.resume`'s path. Collective.

        The first batch calls it if your script did not. Call `prepare` and `track` before it. Idempotent. If it raises
        after a checkpoint was partly read, this engine cannot be used any more.

        Raises:
            CheckpointError: no checkpoint of the run is intact, or it does not fit the prepared models.
        """
        if not self._state.started:
            self._state.resume()
            self._state.start()

    def load(self, path: str | Location) -> None:
        """Restore everything from a checkpoint, or from a run's newest intact one. Collective; before the first batch.

        Raises:
            ConfigError: the loop has started.
            CheckpointError: the checkpoint cannot be read, or it does not fit the prepared models.
        """
        self._state.load(path)

    def load_weights(
        self,
        name: str,
        path: str | Location,
        *,
        strict: bool = True,
        only: Sequence[str] = (),
        rename: Callable[[str], str] | None = None,
    ) -> Differences:
        """Load only the weights of one prepared model. Collective.

        Args:
            name: the prepared model.
            path: a run, a checkpoint, or weights in any supported format (a Hugging Face folder, a safetensors file, a
                file of torch.save, a checkpoint of torch DCP or DeepSpeed).
            strict: whether missing and unexpected names raise. Otherwise they are logged and returned.
            only: glob patterns of the model's names. Other weights keep their values.
            rename: maps a stored name to the model's name.

        Returns:
            The missing and unexpected names.

        Raises:
            CheckpointError: names or shapes do not fit. No weight is changed on any rank.
        """
        return self._state.load_weights(name, path, strict=strict, only=only, rename=rename)

    def load_for_evaluation(self, name: str, path: str | Location) -> None:
        """Load a prepared model's weights, its objective's, and the key of its random numbers. Collective."""
        self._state.load_for_evaluation(name, path)

    def full_weights(self, name: str = "model") -> dict[str, Tensor]:
        """Return every parameter and persistent buffer, unsharded, on the CPU of every rank. Collective."""
        return dict(self.strategy.full_weights(self._find(name)))

    # ------------------------------------------------------------------ the end

    def finish(self) -> str:
        """Save once more, write status and plot, and return the run's state. Collective.

        Returns `finished`, or `interrupted` if Ctrl-C stopped the run before its end. Leaving the `with` block calls it
        if your script did not.
        """
        return self._state.finish(stopped=self._state.stopped)

    def fail(self, error: BaseException) -> None:
        """Record an error as this run's end: in status.json, for the other ranks, and on the error itself. Local."""
        failure = settle(self.world.group, error)
        error.first_cause = failure  # type: ignore[attr-defined]
        # Rank 0 writes the status too: its last report may have replaced what the failed rank wrote, and the failed
        # rank may be on a machine without the run's folder.
        if failure.mine or self.rank == 0:
            rank = max(failure.rank, 0)
            self.run_log.failed(self.progress, failure.text, failure.exit_code, rank=rank, in_ledger=failure.mine)

    def close(self) -> None:
        """Release signal handlers, files and the process group, unless the group existed before. Collective."""
        atexit.unregister(self._leave)
        self._interrupts.__exit__(None, None, None)
        self._state.saver.close()
        self.run_log.close()
        self.strategy.close()
        self.world.group.close()
        self._logs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None:
                self.fail(error)
            elif self._state.started:
                self._finish_or_fail()
        finally:
            self.close()

    def _leave(self) -> None:
        """Close an engine that nobody closed when the interpreter ends: a script without `with`, or a failed script."""
        error = getattr(sys, "last_value", None) if self._state.ended is None else None
        self.__exit__(None, error, None)
        if error is not None:
            leave_in_time()

    def _finish_or_fail(self) -> None:
        try:
            self.finish()
        except BaseException as error:
            self.fail(error)
            raise

    def _find(self, name: str) -> Prepared:
        prepared = self._models.find(name)
        self._state.reject_partly_restored()
        return prepared


@dataclass(frozen=True)
class Failure:
    """The first cause of a run's failure, as one rank knows it.

    Attributes:
        mine: whether this rank failed first.
        rank: the rank that failed first, -1 if unknown.
        exit_code: the exit code of every rank.
        text: the first cause.
        replaced: whether `text` explains more than the raised error, as for a peer that disappeared.
    """

    mine: bool
    rank: int
    exit_code: int
    text: str
    replaced: bool = False


def settle(group: Group, error: BaseException) -> Failure:
    """Agree on whose failure came first, through the store and without a collective. Local."""
    if isinstance(error, OtherRankError):
        return _others(group, error.exit_code) or Failure(False, -1, error.exit_code, str(error))
    replaced = group.size > 1 and _peer_went_away(error)
    if replaced:
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            found = _others(group, 1)
            if found is not None:
                return found
            time.sleep(0.05)
        error = LaunchError(
            explain(
                "Cannot continue without all processes of this world.",
                f"one of them ended without an error message (killed, out of memory, a lost node): {str(error)[:200]}",
                "run the same command again: it continues from the last checkpoint",
            )
        )
    if is_lost_worker(error):
        replaced, error = True, lost_worker(error)
    code = (
        error.exit_code
        if isinstance(error, DisttrainError)
        else INTERRUPTED
        if isinstance(error, KeyboardInterrupt)
        else 1
    )
    text = f"{type(error).__name__}: {error}"
    if group.report_failure(f"{code}:{text}"):
        return Failure(True, group.rank, code, text, replaced)
    return _others(group, code) or Failure(True, group.rank, code, text, replaced)


def _others(group: Group, code: int) -> Failure | None:
    found = group.first_failure()
    if found is None or found[0] == group.rank:
        return None
    rank, report = found
    number, _, text = report.partition(":")
    return Failure(False, rank, int(number) if number.isdigit() else code, text)


def _peer_went_away(error: BaseException) -> bool:
    """Return whether a collective failed because of its peer: by type for NCCL and the store, by text for gloo."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)  # gloo names its source file
