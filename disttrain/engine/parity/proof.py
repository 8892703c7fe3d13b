"""`prove_parity`: cases against the plain reference, then, for those that differ, trials until something explains it.

Reads top to bottom: references, cases, rounding where parameters differ, trials, one report. Touches no run's folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from disttrain.config import Config, load_to_train
from disttrain.engine import build
from disttrain.engine.parity import causes
from disttrain.engine.parity.cases import Asked, Case, plan_cases, uneven_micro_batch
from disttrain.engine.parity.causes import Cause, Trial
from disttrain.engine.parity.compare import Difference, Rounding, bounds_for, compare_runs
from disttrain.engine.parity.launch import Failed, Outcome, run_tasks
from disttrain.engine.parity.recorded import Recorded
from disttrain.engine.parity.report import Report, Row
from disttrain.engine.parity.task import Job, Task
from disttrain.errors import ConfigError, DisttrainError, explain

ALONE = ("strategy.name=none", "mesh.replicate=1", "mesh.shard=-1", "mesh.tensor=1")
WIDER = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}


class ReferenceError(DisttrainError):
    """There is nothing to compare with; `exit_code` is that of the reference's own failure."""

    def __init__(self, failed: Failed) -> None:
        do = "mend it: `disttrain.run` with strategy.name=none fails alike"
        super().__init__(explain("The config is to train in one process first.", failed.text, do))
        self.exit_code = failed.exit_code


def prove_parity(
    config: str,
    overrides: Sequence[str],
    asked: Asked,
    *,
    steps: int = 5,
    limit_s: float = 300.0,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run everything in processes of its own, and compare. Local.

    Raises ConfigError for a config or a case that cannot be read; ReferenceError where one process cannot train it.
    """
    overrides = [*overrides, *_in_samples(load_to_train(config, overrides))]
    own = load_to_train(config, overrides)
    assert own.data is not None and isinstance(own.data.global_batch, int)
    micro_batch = own.data.micro_batch if isinstance(own.data.micro_batch, int) else None
    cases = plan_cases(
        lambda more: load_to_train(config, [*overrides, *more]),
        asked,
        global_batch=own.data.global_batch,
        micro_batch=micro_batch,
    )
    with TemporaryDirectory(prefix="disttrain-parity-") as folder:
        job = Job(str(config), tuple(overrides), Path(folder), steps)
        return _Proof(own, job, limit_s, say).of(cases, asked, micro_batch or own.data.global_batch)


def _in_samples(config: Config) -> list[str]:
    """Batches given in tokens, as overrides in samples: only the dataset knows."""
    data = config.data
    assert data is not None
    amounts = {"global_batch": data.global_batch, "micro_batch": data.micro_batch}
    counted = {key: amount for key, amount in amounts.items() if amount is not None and not isinstance(amount, int)}
    if not counted:
        return []
    dataset = build.dataset_of(config, data.train)
    return [f"data.{key}={build.samples_of(one, dataset=dataset, key=f'data.{key}')}" for key, one in counted.items()]


@dataclass(eq=False)
class _Pair:
    """A row on its way: what is compared with which reference. `base` is the reference's micro-batch."""

    row: Row
    key: str
    overrides: tuple[str, ...]
    base: int
    trials: list[Trial]

    @property
    def is_case(self) -> bool:
        """Whether this is a run of the engine, and not the reference at another micro-batch."""
        return self.key.startswith("case-")


class _Proof:
    """One proof at work: its references by micro-batch, its outcomes by key."""

    def __init__(self, own: Config, job: Job, limit_s: float, say: Callable[[str], None]) -> None:
        self._own, self._job, self._limit_s, self._say = own, job, limit_s, say
        self._bounds = bounds_for(own.precision.compute, own.precision.master)
        self._plain = own.precision.compute != "fp16"  # loss scaling has state, which a plain loop would only copy
        self._outcomes: dict[str, Outcome] = {}
        self._probe: Mapping[str, Any] = {}
        self._rounding: dict[int, Rounding] = {}

    def of(self, cases: Sequence[Case], asked: Asked, base: int) -> Report:
        assert self._own.data is not None and isinstance(self._own.data.global_batch, int)
        default = not (asked.strategies or asked.cases or asked.micro_batches)
        uneven = uneven_micro_batch(self._own.data.global_batch, base) if default else None
        sizes = dict.fromkeys(
            [base, *filter(None, [uneven]), *(case.micro_batch for case in cases if not case.refused)]
        )
        self._run_references(list(sizes), base)
        reference = self._found(_reference_key(base))
        pairs = [self._other_micro_batch(size, base) for size in sizes if size != base]
        pairs += [self._case(number, case) for number, case in enumerate(cases)]
        self._run_cases(pairs)
        for pair in pairs:
            self._judge(pair)
        self._set_rounding_apart(pairs)
        self._explain(pairs)
        return Report(
            rows=tuple(pair.row for pair in pairs),
            steps=reference.steps,
            bounds=self._bounds,
            micro_batch=base,
            global_batch=self._own.data.global_batch,
            reference=reference,
            plain=self._plain,
            model={key: value for key, value in self._probe.items() if key != "objective"},
            note=causes.objective_cause(self._probe),
        )

    # ------------------------------------------------------------------ runs

    def _run(self, tasks: Sequence[Task], world_size: int, titles: Mapping[str, str]) -> None:
        self._outcomes |= run_tasks(
            self._job, tasks, world_size, limit_s=self._limit_s, tell=lambda task: self._say(titles[task.key])
        )

    def _run_references(self, sizes: Sequence[int], base: int) -> None:
        tasks = [self._reference(size, probe=self._plain and size == base) for size in sizes]
        if not self._plain:
            tasks.append(replace(self._reference(base, key="probe", probe=True), reference=True))
        titles = {task.key: f"one process, micro-batch {task.micro_batch}" for task in tasks}
        self._run(tasks, 1, titles)
        self._probe = self._found("probe" if not self._plain else _reference_key(base)).facts["probe"]

    def _reference(self, size: int, overrides: Sequence[str] = (), *, key: str | None = None, **more: Any) -> Task:
        given = (*ALONE, f"data.micro_batch={size}", *overrides)
        return Task(key or _reference_key(size), given, size, reference=self._plain, **more)

    def _found(self, key: str) -> Recorded:
        outcome = self._outcomes[key]
        if isinstance(outcome, Failed):
            raise ReferenceError(outcome)
        return outcome

    def _other_micro_batch(self, size: int, base: int) -> _Pair:
        row = Row("one process", 1, size, ())
        return _Pair(row, _reference_key(size), (), base, causes.micro_batch_trials(self._probe))

    def _case(self, number: int, case: Case) -> _Pair:
        row = Row(case.name, case.world_size, case.micro_batch, case.overrides)
        gpus = torch.cuda.device_count() if self._own.run.device != "cpu" else 0
        trials: list[Trial] = []
        if case.refused:
            row = replace(row, verdict="refused", error=Failed(ConfigError.exit_code, case.refused))
        elif case.world_size > gpus > 0:
            error = Failed(
                0, f"it needs {case.world_size} GPUs, this machine has {gpus}; run.device=cpu runs it on CPUs"
            )
            row = replace(row, verdict="skipped", error=error)
        else:
            config = load_to_train(self._job.config, [*self._job.overrides, *case.overrides])
            trials = causes.case_trials(case.overrides, self._own, config, self._probe)
        return _Pair(row, f"case-{number}", case.overrides, case.micro_batch, trials)

    def _run_cases(self, pairs: Sequence[_Pair]) -> None:
        to_run = [pair for pair in pairs if pair.row.verdict is None and pair.key not in self._outcomes]
        for size in sorted({pair.row.world_size for pair in to_run}):
            here = [pair for pair in to_run if pair.row.world_size == size]
            self._run(
                [Task(pair.key, pair.overrides) for pair in here], size, {pair.key: pair.row.title for pair in here}
            )

    # ------------------------------------------------------------------ verdicts

    def _compare(self, found: str, expected: str, rounding: Rounding | None = None) -> Difference | None:
        """None where either did not come to its end."""
        ours, theirs = self._outcomes.get(found), self._outcomes.get(expected)
        if not isinstance(ours, Recorded) or not isinstance(theirs, Recorded):
            return None
        return compare_runs(ours, theirs, self._bounds, rounding)

    def _judge(self, pair: _Pair) -> None:
        if pair.row.verdict is not None:
            return
        outcome, reference = self._outcomes[pair.key], self._outcomes[_reference_key(pair.base)]
        failed = outcome if isinstance(outcome, Failed) else reference if isinstance(reference, Failed) else None
        if failed is not None:
            verdict = "refused" if failed.exit_code in (2, 3) else "failed"
            pair.row = replace(pair.row, verdict=verdict, error=failed)
            return
        difference = self._compare(pair.key, _reference_key(pair.base))
        assert difference is not None
        pair.row = replace(pair.row, verdict="equal" if difference.equal else "differs", difference=difference)
        if difference.equal and pair.is_case:
            shutil.rmtree(self._job.folder / pair.key)

    def _set_rounding_apart(self, pairs: Sequence[_Pair]) -> None:
        """Where nothing but parameters differs, entries without a gradient may be all: measured in a wider type."""
        doubted = [
            one for one in pairs if one.row.difference is not None and one.row.difference.first_in == "parameters"
        ]
        wide = WIDER.get(self._own.precision.compute)
        if not doubted or wide is None:
            return
        wider = (f"precision.compute={wide}", "precision.master=null", "precision.reduce=null")
        tasks = []
        for size in sorted({pair.base for pair in doubted}):
            tasks.append(self._reference(size, key=f"gradients-{size}", gradients=True))
            tasks.append(self._reference(size, wider, key=f"wide-gradients-{size}", gradients=True))
        tasks = [replace(task, reference=True) for task in tasks]
        self._run(tasks, 1, {task.key: f"one process in {wide}, for the rounding of gradients" for task in tasks})
        for pair in doubted:
            own, wide_run = (self._outcomes[f"{kind}gradients-{pair.base}"] for kind in ("", "wide-"))
            if isinstance(own, Recorded) and isinstance(wide_run, Recorded):
                self._rounding[pair.base] = Rounding(own, wide_run)
                difference = self._compare(pair.key, _reference_key(pair.base), self._rounding[pair.base])
                assert difference is not None
                verdict = "equal" if difference.equal else "differs"
                pair.row = replace(pair.row, verdict=verdict, difference=difference)

    # ------------------------------------------------------------------ causes

    def _explain(self, pairs: Sequence[_Pair]) -> None:
        """First what one process can show, all at once; then a trial for each pair and round, the likeliest first."""
        doubted = [pair for pair in pairs if pair.row.verdict == "differs"]
        if not self._probe["elementwise"]:
            for pair in pairs:
                if pair.row.verdict == "failed":
                    pair.trials = [trial for trial in pair.trials if trial.cause == causes.OPTIMIZER]
                    doubted.append(pair)
        alone = [(pair, trial) for pair in doubted for trial in pair.trials if trial.alone or not pair.is_case]
        self._try(alone)
        rest = {pair.key: [trial for trial in pair.trials if (pair, trial) not in alone] for pair in doubted}
        while turn := [(pair, rest[pair.key].pop(0)) for pair in doubted if not pair.row.causes and rest[pair.key]]:
            self._try(turn)
        for pair in pairs:
            self._conclude(pair)

    def _try(self, turn: Sequence[tuple[_Pair, Trial]]) -> None:
        """Run the trials, those of one world together, and keep for each pair the first that made it equal."""
        references: dict[tuple[int, Trial], Task] = {}
        cases: dict[str, tuple[int, Task]] = {}
        for pair, trial in turn:
            for size in {pair.base, *(() if pair.is_case else (pair.row.micro_batch,))}:
                key = f"trial-{len(self._outcomes)}-{len(references)}"
                task = self._reference(size, trial.overrides, key=key, quiet=trial.quiet)
                references.setdefault((size, trial), task)
            if pair.is_case and not trial.alone:
                key = f"{pair.key}-trial-{len(self._outcomes)}"
                task = Task(key, (*pair.overrides, *trial.overrides), quiet=trial.quiet)
                cases[pair.key] = (pair.row.world_size, task)
        if references:
            self._run(list(references.values()), 1, {task.key: "one process, a trial" for task in references.values()})
        for size in sorted({size for size, _ in cases.values()}):
            tasks = [task for world_size, task in cases.values() if world_size == size]
            self._run(tasks, size, {task.key: f"{size} processes, a trial" for task in tasks})
        for pair, trial in turn:
            found = pair.key
            if not pair.is_case:
                found = references[pair.row.micro_batch, trial].key
            elif not trial.alone:
                found = cases[pair.key][1].key
            difference = self._compare(found, references[pair.base, trial].key, self._rounding.get(pair.base))
            if difference is not None and difference.equal and not pair.row.causes:
                pair.row = replace(pair.row, causes=(trial.found,))

    def _conclude(self, pair: _Pair) -> None:
        row = pair.row
        found = row.causes
        if row.verdict == "differs" and not found:
            objective = None if pair.is_case else causes.objective_cause(self._probe)
            found = (objective or causes.unexplained(self._probe),)
        if row.verdict == "refused" and not self._probe["elementwise"] and "optimizer" in str(row.error):
            shown = "steps on a small matrix and on its parts differ"
            found = (Cause(causes.OPTIMIZER, causes.optimizer_text(self._own), shown),)
        drawn = row.verdict == "differs" and not pair.is_case and [one.cause for one in found] == [causes.DROPOUT]
        pair.row = replace(row, causes=found, verdict="draws" if drawn else row.verdict)


def _reference_key(size: int) -> str:
    return f"reference-{size}"
