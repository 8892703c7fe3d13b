"""`Engine`: the public heart. Process group, mesh, seeds and run folder, several prepared models, one step's acts.

`disttrain.run`'s own loop uses nothing but what is public here, so an own loop keeps resume, reports and checkpoints.
Every public method is collective (all ranks call it, in the same order) unless its docstring says local.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disttrain.checkpoint import Differences, Location
from disttrain.config import Config, load_config
from disttrain.data import Batches, MicroBatch, StepBatch, align_batches
from disttrain.engine import build
from disttrain.engine.checkpointing.run_state import RunState
from disttrain.engine.checkpointing.snapshot import Progress
from disttrain.engine.datasets import Datasets
from disttrain.engine.device_batches import to_device
from disttrain.engine.evaluation import evaluate_set
from disttrain.engine.objectives import Objectives
from disttrain.engine.run_log import Record
from disttrain.errors import ConfigError, explain
from disttrain.launch.accelerate import settle_strategy
from disttrain.model.batch_norm import explain_single_value, synchronized
from disttrain.objective import Objective
from disttrain.optim.build import users_optimizer, users_schedule
from disttrain.optim.trials import refuse_closures
from disttrain.resilience import Interrupts
from disttrain.runtime.leaving import leave_in_time
from disttrain.runtime.seeds import derive_seed, seed_all
from disttrain.strategy import Ingredients, Prepared, StepOutcome, StepSums
from disttrain.strategy.buffers import share_buffers
from disttrain.strategy.construction import refuse_unfrozen


class Engine:
    """Built from a config, a mapping or a path. Use as a context manager; without, the script's end finishes the run.

    Raises ConfigError, LaunchError before any process group exists; CheckpointError where the folder holds another run.
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | Path, overrides: Any = ()) -> None:
        self.config = settle_strategy(load_config(config, overrides))
        self.plan = build.plan_run(self.config)
        self.world = build.start_world(self.plan)
        self._interrupts = Interrupts()
        self._interrupts.__enter__()
        try:
            self.strategy = self.plan.strategy(self.config.strategy.options, self.world)
            self.record = Record(self.config, self.plan, self.world.group)
        except BaseException:  # nobody gets an engine to close
            self._interrupts.__exit__(None, None, None)
            self.world.group.close()
            raise
        self._prepared: dict[str, Prepared] = {}
        self._objectives = Objectives(self.config, self.world)
        self._used: dict[str, Objective] = {}
        self._pending: dict[str, StepSums] = {}
        self._datasets = Datasets(self.config, self.world)
        self._clip_norm = self.config.clip_norm
        evaluated = self.config.eval.every if self.config.eval else None
        self._every = {"eval": evaluated, "checkpoint": self.config.checkpoint.every}
        self._state = RunState(self.config, self.world, self.strategy, self.record, self._datasets, self._prepared)
        self._stopped = False
        self._taken: list[tuple[str, dict[str, Any], int, int]] = []

    # ------------------------------------------------------------------ who and where

    @property
    def rank(self) -> int:
        """This process's rank. Local."""
        return self.world.group.rank

    @property
    def world_size(self) -> int:
        """Number of processes. Local."""
        return self.world.group.size

    @property
    def device(self) -> torch.device:
        """Where this rank computes. Local."""
        return self.world.device

    @property
    def folder(self) -> Path:
        """The run's folder. Local."""
        return self.record.folder.path

    @property
    def progress(self) -> Progress:
        """Where the run stands. Local."""
        return self._state.progress

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, None where an own loop decides. Local."""
        return self._datasets.total_steps

    # ------------------------------------------------------------------ parts

    def prepare(
        self,
        name: str = "model",
        make_model: Callable[[], nn.Module] | None = None,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        make_schedule: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        objective: Any = None,
    ) -> nn.Module:
        """Build, place and equip one named model; without factories, the config's own. Returns the module to call.

        A model given without `make_optimizer` is frozen. An `objective` that is an nn.Module is trained with it.
        """
        if name in self._prepared:
            raise ConfigError(
                explain(f"prepare({name!r})", "that name is taken", "prepare each model under its own name")
            )
        if make_model is None:
            ingredients = self._configured(name, objective)
        else:
            ingredients = Ingredients(
                name,
                make_model,
                users_optimizer(make_optimizer) if make_optimizer is not None else None,
                users_schedule(make_schedule) if make_schedule is not None else None,
                self._objectives.adopt(name, objective),
            )
        if ingredients.make_optimizer is not None:
            if make_optimizer is not None:
                refuse_closures(ingredients.make_optimizer, f"The optimizer of {name!r}")
            self.strategy.check_optimizer(ingredients.make_optimizer, self.world.mesh)
        prepared = self.strategy.prepare(ingredients)
        self._prepared[name] = prepared
        if make_model is None and self.config.model is not None and self.config.model.weights:
            self.load_weights(name, self.config.model.weights, strict=self.config.model.weights_strict)
        return prepared.model

    def _configured(self, name: str, objective: Any) -> Ingredients:
        config = self.config
        self._datasets.train()  # says how long the run is, where epochs or tokens do
        make_schedule = None
        if config.schedule is not None:
            if self.total_steps is None:
                raise ConfigError(explain("A schedule needs to know the run's steps.", "none", "set run.steps"))
            make_schedule = build.schedule_factory_of(config, self.total_steps)
        make_model = build.model_factory(config)
        if config.model is not None and config.model.sync_batch_norm:
            make_model = synchronized(make_model, self.world.mesh.data_group)
        return Ingredients(
            name,
            make_model,
            build.optimizer_factory_of(config),
            make_schedule,
            self._objectives.adopt(name, objective if objective is not None else build.objective_of(config)),
        )

    def batches(
        self,
        dataset: Any = None,
        *,
        name: str = "train",
        global_batch: int | None = None,
        micro_batch: int | None = None,
        own_draws: bool = True,
        **options: Any,
    ) -> Iterator[StepBatch]:
        """Lists of this rank's micro-batches, one per optimizer step, on the device; the config's where not given.

        Endless: `should_stop` ends the loop. The first call of `next` resumes the run, if there is a checkpoint to
        resume from: prepare and track before it. Each `next` sets torch's, numpy's and Python's generators from (seed,
        step, this rank's part of the data), so that a script's own draws are the same after a resume. A second dataset
        takes a `name` of its own, under which its position is kept. A loop without `own_draws` saves 15 microseconds a
        step; micro-batches are seeded either way.
        """
        batches = self._datasets.batches(name, dataset, global_batch, micro_batch, options)
        return self._steps(batches, name, own_draws)

    def _steps(self, batches: Batches, name: str, own_draws: bool) -> Iterator[StepBatch]:
        self.resume()
        if name in self.progress.positions:
            batches.load_state_dict(self.progress.positions[name])
        try:
            if self.finished():
                return
            tokens = self._datasets.tokens_per_sample(name)
            for step in self.record.loading(iter(batches)):
                for place, micro in enumerate(step):
                    step[place] = to_device(micro, self.device)
                self._taken.append((name, step.position, step.samples, step.samples * tokens))
                if own_draws:
                    key = derive_seed(self.world.seed, "loop", self.progress.steps, self.world.mesh.part[0])
                    seed_all(key, self.device)
                yield step
                if self._state.within_step:
                    raise ConfigError(
                        explain("The loop takes its next batch.", "engine.step, and no engine.log after it", "call it")
                    )
        finally:
            batches.close()

    def micro_batches(self, batches: Sequence[Any]) -> list[MicroBatch]:
        """A step's list from batches that a script made itself; ranks that bring fewer replay their last.

        A loop without `batches` calls `resume` before it computes anything.
        """
        self.resume()
        counts = self.world.group.gather_all(len(batches))
        return [to_device(micro, self.device) for micro in align_batches(batches, counts, self.world.mesh.part[0])]

    # ------------------------------------------------------------------ one step

    def accumulate(self, name: str, micro_batches: Sequence[MicroBatch], objective: Any = None) -> StepSums:
        """Forward and backward of all micro-batches, exact over ranks; other prepared models pass gradients through.

        Returns the step's sums: `.loss` is that of the whole global batch.
        """
        prepared = self._find(name)
        if not prepared.named:
            raise ConfigError(
                explain(
                    f"accumulate({name!r})",
                    "a model prepared without an optimizer: it is frozen",
                    "pass make_optimizer to prepare",
                )
            )
        if not micro_batches or not all(isinstance(micro, MicroBatch) for micro in micro_batches):
            found = ", ".join(sorted({type(micro).__name__ for micro in micro_batches})) or "an empty list"
            do = f"take it from engine.batches(), or pass engine.micro_batches([...]) to accumulate({name!r}, ...)"
            raise ConfigError(explain("A step's list of micro-batches.", found, do))
        flags = (1.0 if self._interrupts.requested else 0.0, 1.0 if self._state.saver.failed else 0.0)
        used = self._objectives.find(name, objective)
        with self._others_frozen(name):
            try:
                sums = self.strategy.accumulate(prepared, micro_batches, used, flags)
            except ValueError as error:
                explain_single_value(error)
                raise
        self._used[name] = used
        self._stopped = self._stopped or sums.flags[0] > 0
        if sums.flags[1]:
            self._state.saver.wait()
        self._pending[name] = sums if name not in self._pending else self._pending[name].plus(sums)
        return sums

    def backward(self, name: str, total: Tensor, weight: float | Tensor = 1.0) -> StepSums:
        """Like `accumulate`, for a `total` that a script computed by hand from `weight` items on this rank."""
        by_hand = MicroBatch(batch=None, index=self.world.mesh.part[0], real=True, samples=0)
        return self.accumulate(name, [by_hand], lambda model, batch: (total, weight))

    def step(self, name: str = "model") -> StepOutcome:
        """Scale, clip, step, schedule, zero. A step whose weight is zero changes nothing and is counted."""
        prepared = self._find(name)
        if name not in self._pending:
            raise ConfigError(explain(f"step({name!r})", "nothing accumulated", "call accumulate or backward before"))
        sums = self._pending.pop(name)
        upcoming = self.progress.steps + 1
        # Where it will be saved a gradient that is not finite is found before it reaches the weights.
        want_norm = self._falls_on("checkpoint", upcoming) or self.record.due(upcoming, self.total_steps)
        outcome = self.strategy.step(prepared, sums, clip_norm=self._clip_norm, want_norm=want_norm)
        if want_norm:
            refuse_unfrozen(prepared)
        if not outcome.applied:
            self.progress.skipped += 1
        self.record.stepped(name, sums, outcome, prepared, self._used[name])
        self._state.within_step = True
        return outcome

    def log(self, **values: float) -> None:
        """End this step: count it and, on steps that are reported, write `values` and the step's own measures.

        Local, and free of device syncs on steps that are not reported.
        """
        progress = self._state.progress
        for name, position, samples, tokens in self._taken:
            progress.positions[name] = position
            progress.samples += samples
            progress.tokens += tokens
        self._taken.clear()
        progress.steps += 1
        self._state.within_step = False
        self.record.ended(progress, self.total_steps, values)

    def due(self, what: str) -> bool:
        """Whether `eval` or `checkpoint` falls on the step that just ended. Local."""
        return self._falls_on(what, self.progress.steps)

    def _falls_on(self, what: str, step: int) -> bool:
        every = self._every[what]
        return every is not None and step % every == 0

    def should_stop(self) -> bool:
        """Save if a checkpoint is due; True once the run's steps are done or a stop was asked for on any rank.

        With `checkpoint.background` it returns when what is saved was copied, and the copy is written meanwhile.
        """
        self._state.saver.settle()
        if self.due("checkpoint"):
            self._state.save_due()
        return self._stopped or self.finished()

    def finished(self) -> bool:
        """Whether the run's steps are done. Local."""
        return self._state.finished

    @property
    def was_finished(self) -> bool:
        """Whether this run had come to its end before this process began. Local."""
        return self._state.was_finished

    @property
    def interrupted(self) -> bool:
        """Whether a stop was asked for (Ctrl-C) on any rank. Local."""
        return self._stopped

    def generator(self, name: str) -> torch.Generator:
        """A generator on the device, keyed by (seed, name, step): equal on all ranks. Local."""
        key = derive_seed(self.config.run.seed, "user", name, self.progress.steps)
        return torch.Generator(self.device).manual_seed(key)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self, sets: Mapping[str, Any] | None = None, *, name: str = "model", objective: Any = None
    ) -> dict[str, float]:
        """Loss and metrics over each set, every sample counted once; returns and reports `eval/SET/NAME`.

        With rank 0's buffers on every rank, which keep them.
        """
        prepared = self._find(name)
        share_buffers(prepared)
        values: dict[str, float] = {}
        for key, dataset in (sets if sets is not None else self._datasets.evaluation_sets).items():
            found = evaluate_set(
                self.world,
                prepared,
                self._objectives.find(name, objective),
                dataset,
                micro_batch=self._datasets.evaluation_micro_batch(),
                collate=self._datasets.collate(),
            )
            values |= {f"eval/{key}/{measure}": value for measure, value in found.items()}
        self.record.evaluated(self.progress, values)
        return values

    def evaluated(self) -> bool:
        """Whether this very step has been evaluated. Local."""
        return self.record.evaluated_at == self.progress.steps

    # ------------------------------------------------------------------ state

    def track(self, name: str, thing: Any, *, per_rank: bool = False) -> None:
        """Save and restore `thing` (it has `state_dict` and `load_state_dict`; JSON values and tensors). Local.

        Its state is the same on all ranks, or `per_rank` each one's own: then a rank gets back what it saved, and one
        that was not there keeps what it has. DTensors are saved by each rank's part.
        """
        self._state.track(name, thing, per_rank=per_rank)

    def save(self) -> Location | None:
        """Write a checkpoint of this step, unless this step has one; returns when it is durable.

        Between `step` and `log` it raises ConfigError: weights and step would not be of one moment. A batch that was
        taken and not yet logged is taken again after a resume. Waits for a save in the background. None too where the
        save failed and `on_failure` is go_on.
        """
        return self._state.save()

    def resume(self) -> None:
        """Begin: continue from the run's own newest whole checkpoint, else from `checkpoint.resume`'s path.

        The first batch does it where a script did not; prepare and track before it. Idempotent. Where it raises after a
        checkpoint was partly read, this engine refuses to go on.
        """
        if not self._state.begun:
            self._state.resume()
            atexit.register(self._leave)
            self._state.begin()

    def load(self, path: str | Location) -> None:
        """Everything from a run's newest whole checkpoint, or from the one named; before the loop begins."""
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
        """Only the weights of one model, from a run, a checkpoint, or weights of any format in docs/checkpoint-formats.

        `only` are glob patterns of the model's names: others keep their values. `rename` makes the model's name of a
        stored one. Without `strict`, missing and unexpected names are logged and returned, not refused.
        """
        return self._state.load_weights(name, path, strict=strict, only=only, rename=rename)

    def load_for_evaluation(self, name: str, path: str | Location) -> None:
        """What an evaluation of one model needs: its weights, its objective's, and where its draws stand."""
        self._state.load_for_evaluation(name, path)

    def full_weights(self, name: str = "model") -> dict[str, Tensor]:
        """Every parameter and persistent buffer whole, on the CPU of every rank."""
        return dict(self.strategy.whole(self._find(name)))

    def finish(self) -> str:
        """End well: the last save, status and plot; returns `finished` or `preempted` (stopped by Ctrl-C).

        Leaving the engine's `with` block does it where a script did not.
        """
        return self._state.finish(stopped=self._stopped)

    def fail(self, error: BaseException) -> None:
        """Leave the first cause where the other ranks and people find it, and on the error itself. Local."""
        error.first_cause = self.record.failed(self.progress, error)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Let go of the process group, signal handlers and files."""
        atexit.unregister(self._leave)
        self._interrupts.__exit__(None, None, None)
        self._state.saver.close()
        self.record.close()
        self.strategy.close()
        self.world.group.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None:
                self.fail(error)
            elif self._state.begun:
                self._finish_or_fail()
        finally:
            self.close()

    # ------------------------------------------------------------------ within

    def _leave(self) -> None:
        """The interpreter ends, and nobody closed this engine: a script without `with`, or one that failed."""
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
        if name not in self._prepared:
            known = ", ".join(self._prepared) or "none"
            raise ConfigError(explain(f"A prepared model {name!r}.", f"prepared: {known}", "call prepare first"))
        self._state.refuse_spoilt()
        return self._prepared[name]

    def _others_frozen(self, name: str) -> AbstractContextManager[Any]:
        """Meanwhile gradients flow through the other models, and none is collected in them."""
        if len(self._prepared) == 1:
            return nullcontext()
        with ExitStack() as stack:
            for other, prepared in self._prepared.items():
                if other != name and prepared.named:
                    stack.enter_context(self.strategy.frozen(prepared))
            return stack.pop_all()
