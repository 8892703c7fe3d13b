"""The trials at work: each row that differs again with one thing changed, until it is equal and the cause is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from disttrain.config import Config, load_to_train
from disttrain.parity import causes
from disttrain.parity.causes import Cause, Trial
from disttrain.parity.runs import Pair, Runs, reference_key
from disttrain.parity.task import Task


class Trials:
    """Over the runs of one proof and the user's own config."""

    def __init__(self, runs: Runs, own: Config) -> None:
        self._runs, self._own = runs, own

    def explain(self, pairs: Sequence[Pair]) -> None:
        """First what one process can show, all at once; then a trial for each pair and round, the likeliest first."""
        doubted = [pair for pair in pairs if pair.row.verdict == "differs"]
        if not self._runs.probe["elementwise"]:
            for pair in pairs:
                if pair.row.verdict == "failed" and pair.is_case:
                    doubted.append(pair)
        rest = {pair.key: self._suspects(pair) for pair in doubted}
        alone = [(pair, one) for pair in doubted for one in rest[pair.key] if one.alone or not pair.is_case]
        self._try(alone)
        rest = {pair.key: [one for one in rest[pair.key] if (pair, one) not in alone] for pair in doubted}
        while turn := [(pair, rest[pair.key].pop(0)) for pair in doubted if not pair.row.causes and rest[pair.key]]:
            self._try(turn)
        for pair in pairs:
            self._conclude(pair)

    def _suspects(self, pair: Pair) -> list[Trial]:
        """What to try, the likeliest first; what failed can only be tried with another optimizer."""
        if not pair.is_case:
            return causes.micro_batch_trials(self._runs.probe)
        trials = causes.case_trials(pair.overrides, self._own, self._config_of(pair), self._runs.probe)
        return [one for one in trials if one.cause == causes.OPTIMIZER or pair.row.verdict != "failed"]

    def _config_of(self, pair: Pair) -> Config:
        return load_to_train(self._runs.job.config, [*self._runs.job.overrides, *pair.overrides])

    def _try(self, turn: Sequence[tuple[Pair, Trial]]) -> None:
        """Run the trials, those of one world together, and keep for each pair the first that made it equal."""
        references: dict[tuple[int, Trial], Task] = {}
        cases: dict[str, tuple[int, Task]] = {}
        for pair, trial in turn:
            for size in {pair.base, *(() if pair.is_case else (pair.row.micro_batch,))}:
                key = f"trial-{len(self._runs.outcomes)}-{len(references)}"
                task = self._runs.reference(size, trial.overrides, key=key, quiet=trial.quiet)
                references.setdefault((size, trial), task)
            if pair.is_case and not trial.alone:
                key = f"{pair.key}-trial-{len(self._runs.outcomes)}"
                task = Task(key, (*pair.overrides, *trial.overrides), quiet=trial.quiet)
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
            if not pair.is_case:
                found = references[pair.row.micro_batch, trial].key
            elif not trial.alone:
                found = cases[pair.key][1].key
            difference = self._runs.compare(found, references[pair.base, trial].key, self._runs.rounding.get(pair.base))
            if difference is not None and difference.equal and not pair.row.causes:
                pair.row = replace(pair.row, causes=(trial.found,))

    def tell_aside(self, pairs: Sequence[Pair]) -> None:
        """What changed nothing here, and would elsewhere: measured with one process."""
        equal = [pair for pair in pairs if pair.is_case and pair.row.verdict == "equal"]
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
            objective = None if pair.is_case else causes.objective_cause(self._runs.probe)
            found = (objective or causes.unexplained(self._runs.probe),)
        if row.verdict == "refused" and not self._runs.probe["elementwise"] and "optimizer" in str(row.error):
            shown = "steps on a small matrix and on its parts differ"
            found = (Cause(causes.OPTIMIZER, causes.optimizer_text(self._own), shown),)
        drawn = row.verdict == "differs" and not pair.is_case and [one.cause for one in found] == [causes.DROPOUT]
        pair.row = replace(row, causes=found, verdict="draws" if drawn else row.verdict)
