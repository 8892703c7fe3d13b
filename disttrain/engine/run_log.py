"""The engine's hand on the run's folder: identity, what is reported when, checkpoints found and kept, how a run ended.

Rank 0 writes; a verdict that every rank needs is agreed on. Costs nothing on steps that are not reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from disttrain.checkpoint import (
    Checkpoint,
    Differences,
    Location,
    newest_intact,
    reject_unwritable,
    remove_stale_staging,
    set_aside,
)
from disttrain.config import Config, build_target, parse_value, render_config
from disttrain.data import StepBatch
from disttrain.engine.build import Plan
from disttrain.engine.checkpointing.documents import refuse_another_run
from disttrain.engine.checkpointing.locate import refuse_moved
from disttrain.engine.checkpointing.opening import open_same
from disttrain.engine.checkpointing.snapshot import Progress
from disttrain.engine.failure import Failure, settle
from disttrain.errors import CheckpointError, explain
from disttrain.logs import package_logger
from disttrain.objective import Objective
from disttrain.report import Rate, Reporter, RunFolder, summarize_run
from disttrain.runtime import Group
from disttrain.strategy import Prepared, StepOutcome, StepSums

_log = package_logger("report")


class Record:
    """Opens the folder DIR/NAME. Collective; raises CheckpointError on every rank where it holds another run."""

    def __init__(self, config: Config, plan: Plan, group: Group) -> None:
        self.folder = RunFolder(plan.folder)
        self.checkpoints = plan.checkpoints
        self._elsewhere = self._folder_elsewhere()
        self._config, self._plan, self._group = config, plan, group
        self._main = group.rank == 0
        self._every = config.report.every
        self._steps: dict[str, tuple[StepSums, StepOutcome, Prepared, Objective]] = {}
        self._first = ""
        self.evaluated_at = -1
        self._evaluation: dict[str, float] = {}
        try:
            earlier = group.together(lambda: self._join() if self._main else {}, "opening the run's folder")
        except BaseException:
            self._unlock()
            raise
        self.earlier: Mapping[str, Any] = group.broadcast(earlier)
        self._reporter: Reporter | None = None
        self._rate: Rate | None = None

    def _join(self) -> Mapping[str, Any]:
        """Rank 0: make the folder its own or recognise the run in it; returns the status found there."""
        self.folder.lock()
        if self._elsewhere is not None:
            self._elsewhere.lock()
        if not self.folder.config.exists():
            return {}
        theirs = self._read_config()
        if self._config.checkpoint.resume == "never":
            raise CheckpointError(
                explain(
                    "checkpoint.resume=never starts from nothing.",
                    f"{self.folder.path} holds a run already",
                    "set another run.name, remove the folder, or set checkpoint.resume=auto",
                )
            )
        refuse_another_run(str(self.folder.path), theirs, self._config.to_dict())
        refuse_moved(self.folder, theirs, self._config)
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
                f"{self.folder.path} is to be continued; its config.yaml says which run it holds.",
                f"{type(found).__name__}: {str(found)[:200]}",
                f"mend {self.folder.config}, set another run.name, or remove the folder",
            )
        )

    # ------------------------------------------------------------------ the run

    def started(self, progress: Progress, total_steps: int | None, prepared: Mapping[str, Prepared]) -> None:
        """Write config and status, cut what an unsaved past left in the metrics, start the clock."""
        self._first = next((name for name, one in prepared.items() if one.named), "")
        self._reporter = self._group.together(
            lambda: self._open_reporter(progress, total_steps, prepared), "opening the run's folder"
        )
        parameters = sum(named.shape.numel() for one in prepared.values() for named in one.named)
        self._rate = Rate(device=self._plan.device.device, parameters=parameters, world_size=self._group.size)
        self._rate.start(samples=progress.samples, tokens=progress.tokens, step=progress.steps)

    def _open_reporter(self, progress: Progress, total_steps: int | None, prepared: Mapping[str, Prepared]) -> Reporter:
        if self._main:
            self._start(progress, total_steps)
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

    def _start(self, progress: Progress, total_steps: int | None) -> None:
        reject_unwritable(self.checkpoints)
        remove_stale_staging(self.checkpoints)
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
        """Whether this step is reported: the first, every `report.every`-th and the last. Local."""
        return step == 1 or step % self._every == 0 or step == total_steps

    def loading(self, steps: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The same steps, with the time noted in which they are waited for. Local."""
        return steps if self._rate is None else self._rate.loading(steps)

    def stepped(
        self, name: str, sums: StepSums, outcome: StepOutcome, prepared: Prepared, objective: Objective
    ) -> None:
        """Keep what this step may be asked for. Local."""
        self._steps[name] = (sums, outcome, prepared, objective)

    def ended(self, progress: Progress, total_steps: int | None, values: Mapping[str, float]) -> None:
        """End of a step. Local; does nothing but count on steps that are not reported."""
        stepped, self._steps = self._steps, {}
        if self._reporter is None or self._rate is None:  # the run was finished before
            return
        self._reporter.advance(progress.steps)
        if not self.due(progress.steps, total_steps):
            return
        line: dict[str, Any] = {"step": progress.steps, "samples": progress.samples, "tokens": progress.tokens}
        for name, (sums, outcome, prepared, objective) in stepped.items():
            # The first model that trains speaks without a prefix, so that a run of one model has plain names.
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
        """What was found if this very step was evaluated; else nothing. Local."""
        return self._evaluation if self.evaluated_at == step else {}

    # ------------------------------------------------------------------ checkpoints

    def committed(self, step: int, path: Location) -> None:
        """Tell of a checkpoint that is whole and durable. Local."""
        if self._main and self._reporter is not None:
            self._reporter.checkpoint(step, path)

    def incident(self, kind: str, **fields: Any) -> None:
        """Tell of something that went wrong and that the run survives. Local."""
        if self._main and self._reporter is not None:
            self._reporter.incident(kind, **fields)

    def find_checkpoint(self, fill: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """The run's own newest whole checkpoint, read by `fill`, else that of `checkpoint.resume=PATH`, else None."""
        never = self._config.checkpoint.resume == "never"
        found, rejected = newest_intact(self.checkpoints, self._group, None if never else fill)
        if rejected and found is None:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in rejected[:3])
            raise CheckpointError(
                explain(
                    f"{self.folder.path} is to be continued.",
                    f"no checkpoint of it is whole: {reasons}",
                    f"repair one, or move them out of {self.checkpoints}: the run then begins anew",
                )
            )
        if rejected:
            self._group.together(lambda: self._set_aside(rejected) if self._main else None, "setting checkpoints aside")
        if found is not None and never:  # in a storage: the run's folder is new
            raise CheckpointError(
                explain(
                    "checkpoint.resume=never starts from nothing.",
                    f"{self.checkpoints} holds a run's checkpoints already",
                    "set another run.name, remove them, or set checkpoint.resume=auto",
                )
            )
        if found is None and self._config.checkpoint.resume not in ("auto", "never"):
            return self.open_checkpoint(self._config.checkpoint.resume)
        return found

    def _set_aside(self, rejected: Sequence[tuple[Location, str]]) -> None:
        for path, reason in rejected:
            aside = set_aside(path)
            _log.warning("%s is not whole and was set aside as %s: %s", path.name, aside.name, reason)
            self.folder.append_ledger("checkpoint_rejected", path=str(path), reason=reason)

    def open_checkpoint(self, path: str | Location) -> Checkpoint:
        """A checkpoint from elsewhere, the same on every rank."""
        return open_same(path, self._group)

    def weights_loaded(self, path: str | Location, differences: Differences) -> None:
        """Say what a load without `strict` left as it was. Local."""
        for title, names in (("missing", differences.missing), ("unexpected", differences.unexpected)):
            if names and self._main:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                _log.warning("%s: %s: %s%s", path, title, ", ".join(names[:10]), more)

    def resumed(self, progress: Progress, path: Location) -> None:
        """Say where the run goes on. Local."""
        _log.info("continues at step %d from %s", progress.steps, path)

    # ------------------------------------------------------------------ the end

    def was_finished(self, total_steps: int | None) -> bool:
        """Whether the folder's status says that these steps are done. Local."""
        step = self.earlier.get("step")
        done = isinstance(step, int) and total_steps is not None and step >= total_steps
        return done and self.earlier.get("state") == "finished"

    def finished_before(self) -> str:
        """Say that there was nothing to do; what the folder tells stands as it is. Local."""
        _log.info(
            "%s finished at step %s already; a larger run.steps continues it", self.folder.path, self.earlier["step"]
        )
        return "finished"

    def last_evaluation(self) -> dict[str, float]:
        """What the folder says of the last evaluation. Local."""
        found: dict[str, float] = summarize_run(self.folder)["evaluation"]
        return found

    def finished(self, progress: Progress, *, interrupted: bool) -> str:
        """Write how the run ended; returns `finished` or `preempted`. Local."""
        state, code = ("preempted", 130) if interrupted else ("finished", 0)
        if self._reporter is not None:
            self._reporter.finish(state, progress.steps, code, "stopped by Ctrl-C" if interrupted else None)
        return state

    def failed(self, progress: Progress, error: BaseException) -> Failure:
        """Settle whose failure came first; the rank that had it writes the status. Local."""
        failure = settle(self._group, error)
        if failure.mine and self.folder.path.is_dir():
            told = f"rank {failure.rank}: {failure.text}"
            try:
                self.folder.write_status("failed", progress.steps, failure.exit_code, told)
                self.folder.append_ledger("failed", step=progress.steps, rank=failure.rank, reason=failure.text)
            except CheckpointError as unwritable:  # a full disk must not hide the first cause
                _log.warning("how the run ended could not be written: %s", unwritable)
        return failure

    def close(self) -> None:
        """Let go of files and trackers. Local."""
        if self._reporter is not None:
            self._reporter.close()
        self._unlock()

    def _folder_elsewhere(self) -> RunFolder | None:
        """The folder of `checkpoint.storage`, which runs in other folders could name too; None for one of this run."""
        place = self.checkpoints
        return RunFolder(place) if isinstance(place, Path) and place != self.folder.checkpoints else None

    def _unlock(self) -> None:
        self.folder.unlock()
        if self._elsewhere is not None:
            self._elsewhere.unlock()
