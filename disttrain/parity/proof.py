"""Compares the variants of a config with the plain reference, and explains the differences by trials.

The order is: references, variants, rounding errors where parameters differ, trials, one report. No folder of a run is
touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from disttrain.config import Config, load_to_train
from disttrain.engine import build
from disttrain.errors import ConfigError
from disttrain.parity import causes
from disttrain.parity.compare import Rounding
from disttrain.parity.recorded import Recorded
from disttrain.parity.report import Report, Row
from disttrain.parity.runs import Pair, Runs, Trials, reference_key
from disttrain.parity.variants import Asked, Variant, plan_variants, uneven_micro_batch
from disttrain.parity.worlds import Failed, Job, Task

WIDER = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}


def prove_parity(
    config: str,
    overrides: Sequence[str],
    asked: Asked,
    *,
    steps: int = 5,
    limit_s: float = 300.0,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs the variants in separate processes and compares them. Local.

    Raises ConfigError for a config or a variant that cannot be read, NoReferenceError if one process cannot train it.
    """
    overrides = [*overrides, *_in_samples(load_to_train(config, overrides))]
    own = load_to_train(config, overrides)
    assert own.data is not None and isinstance(own.data.global_batch, int)
    micro_batch = own.data.micro_batch if isinstance(own.data.micro_batch, int) else None
    cases = plan_variants(
        lambda more: load_to_train(config, [*overrides, *more]),
        asked,
        global_batch=own.data.global_batch,
        micro_batch=micro_batch,
    )
    with TemporaryDirectory(prefix="disttrain-parity-") as folder:
        job = Job(str(config), tuple(overrides), Path(folder), steps)
        return _Proof(own, Runs(own, job, limit_s, say)).of(cases, asked, micro_batch or own.data.global_batch)


def _in_samples(config: Config) -> list[str]:
    """Converts batch sizes in tokens to overrides in samples, which only the dataset can do."""
    data = config.data
    assert data is not None
    amounts = {"global_batch": data.global_batch, "micro_batch": data.micro_batch}
    counted = {key: amount for key, amount in amounts.items() if amount is not None and not isinstance(amount, int)}
    if not counted:
        return []
    dataset = build.dataset_of(config, data.train)
    return [f"data.{key}={build.samples_of(one, dataset=dataset, key=f'data.{key}')}" for key, one in counted.items()]


class _Proof:
    """The steps of one comparison."""

    def __init__(self, own: Config, runs: Runs) -> None:
        self._own, self._runs = own, runs

    def of(self, cases: Sequence[Variant], asked: Asked, base: int) -> Report:
        assert self._own.data is not None and isinstance(self._own.data.global_batch, int)
        default = not (asked.strategies or asked.cases or asked.micro_batches)
        uneven = uneven_micro_batch(self._own.data.global_batch, base) if default else None
        sizes = dict.fromkeys(
            [base, *filter(None, [uneven]), *(self._seen_by(case) for case in cases if not case.rejected)]
        )
        pairs = [Pair(Row("one process", 1, size, ()), reference_key(size), (), base) for size in sizes if size != base]
        pairs += [self._case(number, case) for number, case in enumerate(cases)]
        reference = self._run_all(list(sizes), base, pairs)
        for pair in pairs:
            self._judge(pair)
        self._set_rounding_apart(pairs)
        trials = Trials(self._runs, self._own)
        trials.explain(pairs)
        trials.note_clipping(pairs)
        return Report(
            rows=tuple(pair.row for pair in pairs),
            steps=reference.steps,
            bounds=self._runs.bounds,
            micro_batch=base,
            global_batch=self._own.data.global_batch,
            reference=reference,
            plain=self._runs.plain,
            model={key: value for key, value in self._runs.probe.items() if key not in ("objective", "trainable")},
            note=causes.objective_cause(self._runs.probe),
        )

    # ------------------------------------------------------------------ runs

    def _case(self, number: int, case: Variant) -> Pair:
        row = Row(case.name, case.world_size, case.micro_batch, case.overrides)
        gpus = torch.cuda.device_count() if self._own.run.device != "cpu" else 0
        if case.rejected:
            row = replace(row, verdict="rejected", error=Failed(ConfigError.exit_code, case.rejected))
        elif case.world_size > gpus > 0:
            error = Failed(
                0, f"it needs {case.world_size} GPUs, this machine has {gpus}; run.device=cpu runs it on CPUs"
            )
            row = replace(row, verdict="skipped", error=error)
        return Pair(row, f"case-{number}", case.overrides, self._seen_by(case))

    def _seen_by(self, case: Variant) -> int:
        """Returns the micro-batch at which one process sees the same items as synchronized batch norm."""
        assert self._own.data is not None and isinstance(self._own.data.global_batch, int)
        synchronized = self._own.model is not None and self._own.model.sync_batch_norm
        return min(case.micro_batch * (case.parts if synchronized else 1), self._own.data.global_batch)

    def _run_all(self, sizes: Sequence[int], base: int, pairs: Sequence[Pair]) -> Recorded:
        """Runs references, then variants of one rank, then larger worlds. Returns the base reference."""
        plain = self._runs.plain
        references = [self._runs.reference(size, probe=plain and size == base) for size in sizes]
        if not plain:
            references.append(replace(self._runs.reference(base, key="probe", probe=True), reference=True))
        to_run = [pair for pair in pairs if pair.is_variant and pair.row.verdict is None]
        for size in sorted({1, *(pair.row.world_size for pair in to_run)}):
            here = [pair for pair in to_run if pair.row.world_size == size]
            tasks = [*(references if size == 1 else ()), *(Task(pair.key, pair.overrides) for pair in here)]
            titles = {task.key: f"one process, micro-batch {task.micro_batch}" for task in references}
            self._runs.run(tasks, size, titles | {pair.key: pair.row.title for pair in here})
            if size == 1:  # raises if one process cannot train it
                self._runs.probe = self._runs.found(reference_key(base) if plain else "probe").facts["probe"]
        return self._runs.found(reference_key(base))

    # ------------------------------------------------------------------ verdicts

    def _judge(self, pair: Pair) -> None:
        if pair.row.verdict is not None:
            return
        outcome, reference = self._runs.outcomes[pair.key], self._runs.outcomes[reference_key(pair.base)]
        failed = outcome if isinstance(outcome, Failed) else reference if isinstance(reference, Failed) else None
        if failed is not None:
            verdict = "rejected" if failed.exit_code in (2, 3) else "failed"
            pair.row = replace(pair.row, verdict=verdict, error=failed)
            return
        difference = self._runs.compare(pair.key, reference_key(pair.base))
        assert difference is not None
        pair.row = replace(pair.row, verdict="equal" if difference.equal else "differs", difference=difference)
        if difference.equal and pair.is_variant:
            shutil.rmtree(self._runs.job.folder / pair.key)

    def _set_rounding_apart(self, pairs: Sequence[Pair]) -> None:
        """Measures rounding errors of gradients where only parameters differ, which they may explain."""
        trainable = set(self._runs.probe["trainable"])
        doubted = [
            pair
            for pair in pairs
            if (found := pair.row.difference) is not None
            and found.first_in == "parameters"
            and any(one.step > 0 and one.name in trainable for one in found.tensors)
        ]
        wide = WIDER.get(self._own.precision.compute)
        if not doubted or wide is None:
            return
        wider = (f"precision.compute={wide}", "precision.master=null", "precision.reduce=null")
        tasks = []
        for size in sorted({pair.base for pair in doubted}):
            tasks.append(self._runs.reference(size, key=f"gradients-{size}", gradients=True))
            tasks.append(self._runs.reference(size, wider, key=f"wide-gradients-{size}", gradients=True))
        tasks = [replace(task, reference=True) for task in tasks]
        self._runs.run(tasks, 1, {task.key: f"one process in {wide}, for the rounding of gradients" for task in tasks})
        for pair in doubted:
            own, wide_run = (self._runs.outcomes[f"{kind}gradients-{pair.base}"] for kind in ("", "wide-"))
            if isinstance(own, Recorded) and isinstance(wide_run, Recorded):
                self._runs.rounding[pair.base] = Rounding(own, wide_run)
                difference = self._runs.compare(pair.key, reference_key(pair.base), self._runs.rounding[pair.base])
                assert difference is not None
                verdict = "equal" if difference.equal else "differs"
                pair.row = replace(pair.row, verdict=verdict, difference=difference)
