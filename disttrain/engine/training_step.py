"""Runs the acts of one optimizer step: accumulate gradients, then apply them.

Learns from the step's all-reduce whether any rank was asked to stop, and whether a save in the background failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from disttrain.data import MicroBatch
from disttrain.engine.checkpointing.run_state import RunState
from disttrain.engine.prepared_models import PreparedModels
from disttrain.engine.run_log import RunLog
from disttrain.errors import ConfigError, explain
from disttrain.model.batch_norm import explain_single_value
from disttrain.objective import Objective
from disttrain.resilience import Interrupts
from disttrain.strategy import AbstractStrategy, StepOutcome, StepSums
from disttrain.strategy.construction import reject_unfrozen


class TrainingStep:
    """One step after another. Collective."""

    def __init__(
        self,
        models: PreparedModels,
        strategy: AbstractStrategy,
        state: RunState,
        log: RunLog,
        interrupts: Interrupts,
        *,
        clip_norm: float | None,
    ) -> None:
        self._models, self._strategy, self._state, self._log = models, strategy, state, log
        self._interrupts, self._clip_norm = interrupts, clip_norm
        self._used: dict[str, Objective] = {}
        self._pending: dict[str, StepSums] = {}

    def accumulate(self, name: str, micro_batches: Sequence[MicroBatch], objective: Any) -> StepSums:
        """Run forward and backward of all micro-batches, and return the step's sums."""
        self._state.reject_partly_restored()
        prepared = self._models.find(name)
        if not prepared.named:
            raise ConfigError(
                explain(
                    f"Cannot train the model {name!r}.",
                    "it was prepared without an optimizer, so it is frozen",
                    "pass make_optimizer to engine.prepare",
                )
            )
        if not micro_batches or not all(isinstance(micro, MicroBatch) for micro in micro_batches):
            raise ConfigError(
                explain(
                    f"accumulate({name!r}, ...) needs a step's list of micro-batches.",
                    ", ".join(sorted({type(micro).__name__ for micro in micro_batches})) or "an empty list",
                    f"take it from engine.batches(), or pass engine.micro_batches([...]) to accumulate({name!r}, ...)",
                )
            )
        flags = (1.0 if self._interrupts.requested else 0.0, 1.0 if self._state.saver.failed else 0.0)
        used = self._models.objective_for(name, objective)
        with self._models.others_frozen(name):
            try:
                sums = self._strategy.accumulate(prepared, micro_batches, used, flags)
            except ValueError as error:
                explain_single_value(error)
                raise
        self._used[name] = used
        self._state.stopped = self._state.stopped or sums.flags[0] > 0
        if sums.flags[1]:
            self._state.saver.wait()
        self._pending[name] = sums if name not in self._pending else self._pending[name].plus(sums)
        return sums

    def step(self, name: str, due: Callable[[str, int], bool], total_steps: int | None) -> StepOutcome:
        """Scale, clip, step, advance the schedule, and zero the gradients of one model."""
        self._state.reject_partly_restored()
        prepared = self._models.find(name)
        if name not in self._pending:
            raise ConfigError(
                explain(
                    f"Cannot step the model {name!r}.",
                    "no gradients were accumulated",
                    "call engine.accumulate or engine.backward first",
                )
            )
        sums = self._pending.pop(name)
        upcoming = self._state.progress.steps + 1
        # Before a save, a gradient that is not finite must be noticed before it reaches the weights.
        want_norm = due("checkpoint", upcoming) or self._log.due(upcoming, total_steps)
        outcome = self._strategy.step(prepared, sums, clip_norm=self._clip_norm, want_norm=want_norm)
        if want_norm:
            reject_unfrozen(prepared)
        if not outcome.applied:
            self._state.progress.skipped += 1
        self._log.stepped(name, sums, outcome, prepared, self._used[name])
        self._state.within_step = True
        return outcome
