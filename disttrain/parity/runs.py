"""Runs the variants, references and trials of one comparison, and keeps their outcomes.

A trial repeats a variant that differs with one thing changed. If both sides are then equal, the cause is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from disttrain.config import Config, load_to_train
from disttrain.errors import DisttrainError, explain
from disttrain.parity import causes
from disttrain.parity.causes import Cause, Trial
from disttrain.parity.compare import Difference, Rounding, bounds_for, compare_runs
from disttrain.parity.recorded import Recorded
from disttrain.parity.report import Row
from disttrain.parity.worlds import Failed, Job, Outcome, Task, run_tasks

ALONE = ("strategy.name=none", "mesh.replicate=1", "mesh.shard=-1", "mesh.tensor=1")


class NoReferenceError(DisttrainError):
    """The reference failed, so there is nothing to compare with. `exit_code` is that of the failure."""

    def __init__(self, failed: Failed) -> None:
        fix = "correct the config; `disttrain.run` with strategy.name=none fails in the same way"
        super().__init__(explain("Cannot train the config in one process.", failed.text, fix))
        self.exit_code = failed.exit_code


@dataclass(eq=False)
class Pair:
    """A row of the report and the run behind it. `base` is the micro-batch of the reference to compare with."""

    row: Row
    key: str
    overrides: tuple[str, ...]
    base: int

    @property
    def is_variant(self) -> bool:
        """Whether this is a run of the engine, rather than the reference at another micro-batch."""
        return self.key.startswith("case-")


class Runs:
    """Runs tasks and compares their outcomes.

    `probe` holds the measured properties of the user's model, `rounding` the rounding errors of gradients by the
    micro-batch of the reference.
    """

    def __init__(self, own: Config, job: Job, limit_s: float, say: Callable[[str], None]) -> None:
        self.job = job
        self._limit_s, self._say = limit_s, say
        self.bounds = bounds_for(own.precision.compute, own.precision.master)
        self.plain = own.precision.compute != "fp16"  # loss scaling has state, which a plain loop would only copy
        self.outcomes: dict[str, Outcome] = {}
        self.probe: Mapping[str, Any] = {}
        self.rounding: dict[int, Rounding] = {}

    def run(self, tasks: Sequence[Task], world_size: int, titles: Mapping[str, str]) -> None:
        """Runs tasks in one world and keeps their outcomes by key. `titles` are printed when a task begins."""
        self.outcomes |= run_tasks(
            self.job, tasks, world_size, limit_s=self._limit_s, started=lambda task: self._say(titles[task.key])
        )

    def reference(self, size: int, overrides: Sequence[str] = (), *, key: str | None = None, **more: Any) -> Task:
        """Returns the task of the reference at a micro-batch of `size`, under further overrides."""
        given = (*ALONE, f"data.micro_batch={size}", *overrides)
        return Task(key or reference_key(size), given, size, reference=self.plain, **more)

    def found(self, key: str) -> Recorded:
        """Returns the outcome of a reference. Raises NoReferenceError if the reference failed."""
        outcome = self.outcomes[key]
        if isinstance(outcome, Failed):
            raise NoReferenceError(outcome)
        return outcome

    def compare(self, found: str, expected: str, rounding: Rounding | None = None) -> Difference | None:
        """Compares two outcomes. Returns None if either run failed."""
        ours, theirs = self.outcomes.get(found), self.outcomes.get(expected)
        if not isinstance(ours, Recorded) or not isinstance(theirs, Recorded):
            return None
        return compare_runs(ours, theirs, self.bounds, rounding)


def reference_key(size: int) -> str:
    """Returns the key of the reference at this micro-batch."""
    return f"reference-{size}"


class Trials:
    """Explains the rows that differ, by trials."""

    def __init__(self, runs: Runs, own: Config) -> None:
        self._runs, self._own = runs, own

    def explain(self, pairs: Sequence[Pair]) -> None:
        """Runs the trials that need one process together, then one trial per pair and round, the likeliest first."""
        doubted = [pair for pair in pairs if pair.row.verdict == "differs"]
        if not self._runs.probe["elementwise"]:
            for pair in pairs:
                if pair.row.verdict == "failed" and pair.is_variant:
                    doubted.append(pair)
        rest = {pair.key: self._suspects(pair) for pair in doubted}
        alone = [(pair, one) for pair in doubted for one in rest[pair.key] if one.alone or not pair.is_variant]
        self._try(alone)
        rest = {pair.key: [one for one in rest[pair.key] if (pair, one) not in alone] for pair in doubted}
        while turn := [(pair, rest[pair.key].pop(0)) for pair in doubted if not pair.row.causes and rest[pair.key]]:
            self._try(turn)
        for pair in pairs:
            self._conclude(pair)

    def _suspects(self, pair: Pair) -> list[Trial]:
        """Returns the trials of a pair, the likeliest first. After a failure only another optimizer is tried."""
        if not pair.is_variant:
            return causes.micro_batch_trials(self._runs.probe)
        trials = causes.case_trials(pair.overrides, self._own, self._config_of(pair), self._runs.probe)
        return [one for one in trials if one.cause == causes.OPTIMIZER or pair.row.verdict != "failed"]

    def _config_of(self, pair: Pair) -> Config:
        return load_to_train(self._runs.job.config, [*self._runs.job.overrides, *pair.overrides])

    def _try(self, turn: Sequence[tuple[Pair, Trial]]) -> None:
        """Runs the trials, those of one world size together, and keeps for each pair the first that made it equal."""
        references: dict[tuple[int, Trial], Task] = {}
        cases: dict[str, tuple[int, Task]] = {}
        for pair, trial in turn:
            for size in {pair.base, *(() if pair.is_variant else (pair.row.micro_batch,))}:
                key = f"trial-{len(self._runs.outcomes)}-{len(references)}"
                task = self._runs.reference(size, trial.overrides, key=key, evaluated=trial.evaluated)
                references.setdefault((size, trial), task)
            if pair.is_variant and not trial.alone:
                key = f"{pair.key}-trial-{len(self._runs.outcomes)}"
                task = Task(key, (*pair.overrides, *trial.overrides), evaluated=trial.evaluated)
                cases[pair.key] = (pair.row.world_size, task)
        if references:
            self._runs.run(
                list(references.values()), 1, {task.key: "one process, a trial" for task in references.values()}
            )
        for size in sorted({size for size, _ in cases.values()}):
            tasks = [task for world_size, task in cases.values() if world_size == size]
            self._runs.run(tasks, size, {task.key: f"{size} processes, a trial" for task in tasks})
        for pair, trial in turn:
            found = pair.key
            if not pair.is_variant:
                found = references[pair.row.micro_batch, trial].key
            elif not trial.alone:
                found = cases[pair.key][1].key
            difference = self._runs.compare(found, references[pair.base, trial].key, self._runs.rounding.get(pair.base))
            if difference is not None and difference.equal and not pair.row.causes:
                pair.row = replace(pair.row, causes=(trial.found,))

    def note_clipping(self, pairs: Sequence[Pair]) -> None:
        """Notes clipping that DeepSpeed alone would apply, with its measured effect."""
        equal = [pair for pair in pairs if pair.is_variant and pair.row.verdict == "equal"]
        asides = [(pair, causes.clip_left_to_deepspeed(self._own, self._config_of(pair))) for pair in equal]
        told = [(pair, trial) for pair, trial in asides if trial is not None]
        tasks = {
            pair.base: self._runs.reference(pair.base, trial.overrides, key=f"aside-{pair.base}")
            for pair, trial in told
        }
        if tasks:
            self._runs.run(
                list(tasks.values()), 1, {task.key: "one process, clipped at 1.0" for task in tasks.values()}
            )
        for pair, trial in told:
            difference = self._runs.compare(tasks[pair.base].key, reference_key(pair.base))
            if difference is not None:
                cause = replace(trial.found, shown_by=causes.clip_measured(difference))
                pair.row = replace(pair.row, causes=(cause,))

    def _conclude(self, pair: Pair) -> None:
        row = pair.row
        found = row.causes
        if row.verdict == "differs" and not found:
            objective = None if pair.is_variant else causes.objective_cause(self._runs.probe)
            found = (objective or causes.unexplained(self._runs.probe),)
        if row.verdict == "rejected" and not self._runs.probe["elementwise"] and "optimizer" in str(row.error):
            shown = "steps on a small matrix and on its parts differ"
            found = (Cause(causes.OPTIMIZER, causes.optimizer_text(self._own), shown),)
        drawn = row.verdict == "differs" and not pair.is_variant and [one.cause for one in found] == [causes.DROPOUT]
        pair.row = replace(row, causes=found, verdict="draws" if drawn else row.verdict)
