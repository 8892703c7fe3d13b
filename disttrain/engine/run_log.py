"""Keeps the log of a run in its folder: which run it is, what is reported when, and how it ended.

Rank 0 writes. What every rank needs to know is agreed on. Steps that are not reported cost nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from yaml import YAMLError

from disttrain.checkpoint import Differences, Location
from disttrain.config import Config, build_target, parse_value, render_config
from disttrain.data import StepBatch
from disttrain.engine.build import Plan
from disttrain.engine.checkpointing.locate import reject_moved_checkpoints
from disttrain.engine.checkpointing.run_checkpoints import RunCheckpoints
from disttrain.engine.checkpointing.run_identity import changed_settings, reject_another_run
from disttrain.engine.checkpointing.snapshot import Progress
from disttrain.errors import FINISHED, INTERRUPTED, CheckpointError, ConfigError, explain
from disttrain.logs import package_logger
from disttrain.objective import Objective
from disttrain.report import Rate, Reporter, RunFolder, summarize_run
from disttrain.runtime import Group
from disttrain.strategy import Prepared, StepOutcome, StepSums

_log = package_logger("report")

_MEASURES = ("loss", "lr", "grad_norm", "loss_scale")
"""Keys of metrics.jsonl that each trained model has. All models but the first have them after a prefix `NAME/`."""
BUILT_IN_KEYS = frozenset(
    {
        *_MEASURES,
        "step",
        "samples",
        "tokens",
        "step_time_s",
        "data_time_s",
        "samples_per_s",
        "tokens_per_s",
        "mfu",
        "mem_peak_bytes",
        "world_size",
        "strategy",
        "skipped",
        "nonfinite",
    }
)
"""Keys of metrics.jsonl that only disttrain writes."""


class RunLog:
    """The log in the folder DIR/NAME. Collective; raises CheckpointError on every rank if it holds another run."""

    def __init__(self, config: Config, plan: Plan, group: Group) -> None:
        self.folder = RunFolder(plan.folder)
        self.checkpoints = RunCheckpoints(plan.checkpoints, config.checkpoint, self.folder, group)
        self._separate = self.checkpoints.separate_folder()
        self._config, self._plan, self._group = config, plan, group
        self._main = group.rank == 0
        self._every = config.report.every
        self._steps: dict[str, tuple[StepSums, StepOutcome, Prepared, Objective]] = {}
        self._first = ""
        self._changed: list[str] = []
        self.evaluated_at = -1
        self._evaluation: dict[str, float] = {}
        try:
            earlier = group.together(lambda: self._open_folder() if self._main else {}, "opening the run's folder")
        except BaseException:
            self._unlock()
            raise
        self.earlier: Mapping[str, Any] = group.broadcast(earlier)
        """What status.json said when the folder was opened; empty for a new run."""
        self._reporter: Reporter | None = None
        self._rate: Rate | None = None

    def _open_folder(self) -> Mapping[str, Any]:
        """Lock the folder, check that it holds this run or none, and return its status. Rank 0 only."""
        self.folder.lock()
        if self._separate is not None:
            self._separate.lock()
        if not self.folder.config.exists():
            return {}
        theirs = self._read_config()
        self.checkpoints.reject_existing_run()
        reject_another_run(str(self.folder.path), theirs, self._config.to_dict())
        reject_moved_checkpoints(self.folder, theirs, self._config)
        self._changed = changed_settings(theirs, self._config.to_dict())
        return self.folder.read_status() or {}

    def _read_config(self) -> Mapping[str, Any]:
        try:
            found = parse_value(self.folder.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, YAMLError) as error:
            found = error
        if isinstance(found, Mapping):
            return found
        raise CheckpointError(
            explain(
                f"Cannot continue the run in {self.folder.path}: its config.yaml does not say which run it holds.",
                f"{type(found).__name__}: {str(found)[:200]}",
                f"repair {self.folder.config}, set another run.name, or remove the folder",
            )
        )

    # ------------------------------------------------------------------ the run

    def started(self, progress: Progress, total_steps: int | None, prepared: Mapping[str, Prepared]) -> None:
        """Write config and status, trim metrics of steps that were never saved, start the clock. Collective."""
        self._first = next((name for name, one in prepared.items() if one.named), "")
        self._reporter = self._group.together(
            lambda: self._open_reporter(progress, total_steps, prepared), "opening the run's folder"
        )
        parameters = sum(named.shape.numel() for one in prepared.values() for named in one.named)
        self._rate = Rate(device=self._plan.device.device, parameters=parameters, world_size=self._group.size)
        self._rate.start(samples=progress.samples, tokens=progress.tokens, step=progress.steps)

    def _open_reporter(self, progress: Progress, total_steps: int | None, prepared: Mapping[str, Prepared]) -> Reporter:
        if self._main:
            self._start_segment(progress, total_steps)
        reporter = Reporter(
            self.folder if self._main else None,
            trackers=self._trackers() if self._main else (),
            total_steps=total_steps,
            progress=self._config.report.progress,
            plot=self._config.report.plot,
            stream=sys.stderr,
        )
        reporter.start(progress.steps, self._describe(prepared))
        return reporter

    def _start_segment(self, progress: Progress, total_steps: int | None) -> None:
        self.checkpoints.make_ready()
        moved = self.folder.trim_metrics(progress.steps)
        self.folder.write_config(render_config(self._config))
        self.folder.append_ledger(
            "segment",
            step=progress.steps,
            total_steps=total_steps,
            world_size=self._group.size,
            strategy=self._config.strategy.name,
            launcher=self._plan.launch.launcher,
            restarts=self._plan.launch.restarts,
            job=self._plan.launch.job,
            metrics_lines_set_aside=moved,
        )
        self.folder.write_status("running", progress.steps, None, None)

    def _trackers(self) -> list[Any]:
        offered = {"run_folder": self.folder.path}
        return [
            build_target(target, section="trackers", folder=self._config.folder, offered=offered)
            for target in self._config.report.trackers
        ]

    def _describe(self, prepared: Mapping[str, Prepared]) -> dict[str, Any]:
        return {
            "strategy": self._config.strategy.name,
            "world_size": self._group.size,
            "parameters": {
                name: sum(named.shape.numel() for named in one.named) for name, one in prepared.items() if one.named
            },
        }

    def due(self, step: int, total_steps: int | None) -> bool:
        """Return whether this step is reported: the first, every `report.every`-th and the last. Local."""
        return step == 1 or step % self._every == 0 or step == total_steps

    def loading(self, steps: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """Yield the same steps and measure how long training waits for each. Local."""
        return steps if self._rate is None else self._rate.loading(steps)

    def stepped(
        self, name: str, sums: StepSums, outcome: StepOutcome, prepared: Prepared, objective: Objective
    ) -> None:
        """Keep what a report of this step may need. Local."""
        self._steps[name] = (sums, outcome, prepared, objective)

    def reject_built_in(self, values: Mapping[str, object], prepared: Mapping[str, Prepared]) -> None:
        """Raise ConfigError where a script's values would replace built-in keys of metrics.jsonl. Local."""
        names = [key for key in values if key in BUILT_IN_KEYS or self._is_measure(key, prepared)]
        if names:
            raise ConfigError(
                explain(
                    f"engine.log cannot write {', '.join(names)}.",
                    "metrics.jsonl has a built-in value of that name",
                    f"log it under another name, such as my_{names[0].replace('/', '_')}",
                )
            )

    @staticmethod
    def _is_measure(key: str, prepared: Mapping[str, Prepared]) -> bool:
        name, slash, measure = key.rpartition("/")
        return bool(slash) and measure in _MEASURES and name in prepared

    def ended(self, progress: Progress, total_steps: int | None, values: Mapping[str, float]) -> None:
        """Report a step that ended. Local; only counts on steps that are not reported."""
        stepped, self._steps = self._steps, {}
        if self._reporter is None or self._rate is None:  # the run was finished before
            return
        self._reporter.advance(progress.steps)
        if not self.due(progress.steps, total_steps):
            return
        line: dict[str, Any] = {"step": progress.steps, "samples": progress.samples, "tokens": progress.tokens}
        for name, (sums, outcome, prepared, objective) in stepped.items():
            # The first model that trains has no prefix, so that a run of one model has plain names.
            prefix = "" if name == self._first else f"{name}/"
            found = {"loss": sums.loss} | objective.summarize(sums.sums, sums.totals, sums.weights)
            line |= {f"{prefix}{key}": value for key, value in found.items()}
            if prepared.optimizer is not None:
                line[f"{prefix}lr"] = outcome.lr
            line[f"{prefix}grad_norm"] = outcome.grad_norm
            if outcome.loss_scale is not None:
                line[f"{prefix}loss_scale"] = outcome.loss_scale
        line |= self._rate.measure(samples=progress.samples, tokens=progress.tokens, step=progress.steps)
        line |= {"world_size": self._group.size, "strategy": self._config.strategy.name}
        if progress.skipped:
            line["skipped"] = progress.skipped
        self._reporter.step(line | dict(values))

    def evaluated(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Report an evaluation. Local."""
        self.evaluated_at, self._evaluation = progress.steps, dict(values)
        if self._reporter is not None:
            self._reporter.evaluation(progress.steps, dict(values))
        elif self._main:
            _log.info("evaluation: %s", ", ".join(f"{key} {value:.4f}" for key, value in values.items()))

    def evaluation_of(self, step: int) -> Mapping[str, float]:
        """Return the values of an evaluation at this step, empty without one. Local."""
        return self._evaluation if self.evaluated_at == step else {}

    def committed(self, step: int, path: Location) -> None:
        """Report a checkpoint that is complete and durable. Local."""
        if self._main and self._reporter is not None:
            self._reporter.checkpoint(step, path)

    def incident(self, kind: str, **fields: Any) -> None:
        """Report something that went wrong and did not end the run. Local."""
        if self._main and self._reporter is not None:
            self._reporter.incident(kind, **fields)

    def weights_loaded(self, path: str | Location, differences: Differences) -> None:
        """Report the names that a load without `strict` did not match. Local."""
        for title, names in (("missing", differences.missing), ("unexpected", differences.unexpected)):
            if names and self._main:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                _log.warning("%s: %s: %s%s", path, title, ", ".join(names[:10]), more)

    def resumed(self, progress: Progress, path: Location) -> None:
        """Report the step and the checkpoint that the run continues from. Local."""
        _log.info("continues at step %d from %s", progress.steps, path)

    # ------------------------------------------------------------------ the end

    def was_finished(self, total_steps: int | None) -> bool:
        """Return whether the folder's status says that these steps are done. Local."""
        step = self.earlier.get("step")
        done = isinstance(step, int) and total_steps is not None and step >= total_steps
        return done and self.earlier.get("state") == "finished"

    def finished_before(self) -> str:
        """Report that the run had finished before, and settings that had no effect. Local. Leaves the folder as is."""
        step = self.earlier["step"]
        _log.info("%s: finished at step %s already; set a larger run.steps to continue it", self.folder.path, step)
        for change in self._changed:
            _log.warning("%s: nothing was trained with the changed %s; set another run.name", self.folder.path, change)
        return "finished"

    def last_evaluation(self) -> dict[str, float]:
        """Return the values of the last evaluation in the folder. Local."""
        found: dict[str, float] = summarize_run(self.folder)["evaluation"]
        return found

    def finished(self, progress: Progress, total_steps: int | None, *, interrupted: bool) -> str:
        """Write how the run ended and return its state, `finished` or `interrupted`. Local."""
        state, code = ("interrupted", INTERRUPTED) if interrupted else ("finished", FINISHED)
        if self._reporter is not None:
            early = not interrupted and total_steps is not None and progress.steps < total_steps
            if early and self._main:
                _log.info("%s: the loop ended before run.steps=%d", self.folder.path, total_steps)
            self._reporter.finish(state, progress.steps, code, "stopped by Ctrl-C" if interrupted else None)
        return state

    def failed(self, progress: Progress, cause: str, exit_code: int, *, rank: int, in_ledger: bool) -> None:
        """Write the status of a run that failed first on `rank`, and a line of the ledger if asked. Local.

        Before the first batch the status keeps the step of the run in the folder. A run that had finished before stays
        finished: otherwise a failed second attempt would make the third attempt train it again.
        """
        if not self.folder.path.is_dir():
            return
        started = self._reporter is not None
        state = "interrupted" if exit_code == INTERRUPTED else "failed"
        step = progress.steps if started else int(self.earlier.get("step") or 0)
        try:
            if started or self.earlier.get("state") != "finished":
                self.folder.write_status(state, step, exit_code, f"rank {rank}: {cause}")
            if in_ledger:
                self.folder.append_ledger(state, step=step, rank=rank, reason=cause)
        except CheckpointError as unwritable:  # a full disk must not hide the first cause
            _log.warning("could not write how the run ended: %s", unwritable)

    def close(self) -> None:
        """Close files and trackers. Local."""
        if self._reporter is not None:
            self._reporter.close()
        self._unlock()

    def _unlock(self) -> None:
        self.folder.unlock()
        if self._separate is not None:
            self._separate.unlock()
