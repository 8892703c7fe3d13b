"""Provides `Engine`, the public interface for training loops.

The loop of `disttrain.run` uses only what is public here. A custom loop therefore keeps resume, reports and
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disttrain.config import Config
from disttrain.data import Batches, MicroBatch, StepBatch, align_batches
from disttrain.engine.datasets import to_device
from disttrain.engine.evaluation import evaluate_set
from disttrain.engine.session import Session
from disttrain.engine.training_step import TrainingStep
from disttrain.errors import ConfigError, explain
from disttrain.runtime.seeds import derive_seed, seed_all
from disttrain.strategy import StepOutcome, StepSums
from disttrain.strategy.buffers import share_buffers


class Engine(Session):
    """Trains models in a custom loop, with the config's strategy, mesh, checkpoints and reports.

    Use the engine as a context manager: leaving the block saves once more and writes how the run ended. Without a
    `with` block, the end of the script does the same.

    Public methods are collective unless they say Local. All ranks must call a collective method, in the same order.

    Args:
        config: a `Config`, a mapping of its sections, or the path of a YAML file.
        overrides: `section.key=value` texts, or a mapping of dotted keys to values.
        logs: whether to report the run's folder, resume, end and warnings on stderr. An application that configured
            Python's logging keeps its configuration and receives these messages through the logger `disttrain`.

    Raises:
        ConfigError: the config is invalid. Raised before a process group exists.
        LaunchError: the environment contradicts itself, or an existing process group has another size, rank or
            backend. An existing group that fits is used and left open.
        CheckpointError: the run's folder holds another run.

    Example:
        >>> with disttrain.Engine("config.yaml") as engine:
        ...     engine.prepare("model", make_model, make_optimizer)
        ...     for micro_batches in engine.batches(dataset, global_batch=32, micro_batch=8):
        ...         sums = engine.accumulate("model", micro_batches, objective)
        ...         engine.step("model")
        ...         engine.log()
        ...         if engine.should_stop():
        ...             break
    """

    def __init__(
        self, config: Config | Mapping[str, Any] | str | Path, overrides: Any = (), *, logs: bool = True
    ) -> None:
        super().__init__(config, overrides, logs=logs)
        self._step = TrainingStep(
            self._models, self.strategy, self._state, self.run_log, self._interrupts, clip_norm=self.config.clip_norm
        )
        evaluated = self.config.eval.every if self.config.eval else None
        self._every = {"eval": evaluated, "checkpoint": self.config.checkpoint.every}
        self._taken: list[tuple[str, dict[str, Any], int, int]] = []

    # ------------------------------------------------------------------ models and data

    def prepare(
        self,
        name: str = "model",
        make_model: Callable[[], nn.Module] | None = None,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        make_schedule: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        objective: Any = None,
    ) -> nn.Module:
        """Build a model under the config's strategy and return the module to call. Collective.

        The arguments are factories, because a strategy may shard the model before its optimizer exists. Prepare each
        model of a run (a generator and a critic, a teacher) under its own name.

        Args:
            name: the model's name in checkpoints and in the other methods.
            make_model: returns the module. Without it, the config's `model`, `optim` and `schedule` are built.
            make_optimizer: maps the list of parameters to an optimizer. A model without an optimizer is frozen.
            make_schedule: maps the optimizer to a learning-rate schedule, which advances once for each step.
            objective: the model's objective. An `nn.Module` with parameters is trained with the model.

        Raises:
            ConfigError: the name is taken, the config has no `model`, or the strategy does not support the optimizer.
            TrainingError: the ranks built different models.
        """
        prepared = self._models.prepare(name, make_model, make_optimizer, make_schedule, objective)
        if make_model is None and self.config.model is not None and self.config.model.weights:
            self.load_weights(name, self.config.model.weights, strict=self.config.model.weights_strict)
        return prepared.model

    def batches(
        self,
        dataset: Any = None,
        *,
        name: str = "train",
        global_batch: int | None = None,
        micro_batch: int | None = None,
        seed_generators: bool = True,
        **options: Any,
    ) -> Iterator[StepBatch]:
        """Yield this rank's list of micro-batches for each optimizer step, on the device. Collective.

        The iterator is endless: leave the loop when `should_stop` returns True. The first `next` resumes the run, so
        call `prepare` and `track` before it.

        Args:
            dataset: a map-style or iterable dataset. Without it, the config's `data.train`.
            name: the name of this dataset's position in checkpoints. Give each further dataset its own name.
            global_batch: samples in one optimizer step, over all ranks. Default: `data.global_batch`.
            micro_batch: samples in one forward pass of one rank. Default: `data.micro_batch`, else one rank's samples.
            seed_generators: whether each `next` seeds torch, numpy and Python from (seed, step, part of the data).
                Random numbers drawn in your loop are then the same after a resume. False saves 15 microseconds a step;
                micro-batches are seeded either way.
            **options: `shuffle`, `last`, `workers`, `prefetch`, `on_resume` and `collate`, as in the config's `data`.

        Raises:
            ConfigError: no dataset or no batch size is known, or the global batch is smaller than the number of
                data-parallel ranks.
            DataError: the dataset is empty, too small, or cannot be read.
        """
        batches = self._datasets.batches(name, dataset, global_batch, micro_batch, options)
        return self._steps(batches, name, seed_generators)

    def _steps(self, batches: Batches, name: str, seed_generators: bool) -> Iterator[StepBatch]:
        self.resume()
        if name in self.progress.positions:
            batches.load_state_dict(self.progress.positions[name])
        try:
            if self.finished():
                return
            tokens = self._datasets.tokens_per_sample(name)
            for step in self.run_log.loading(iter(batches)):
                for index, micro in enumerate(step):
                    step[index] = to_device(micro, self.device)
                self._taken.append((name, step.position, step.samples, step.samples * tokens))
                if seed_generators:
                    key = derive_seed(self.world.seed, "loop", self.progress.steps, self.world.mesh.part[0])
                    seed_all(key, self.device)
                yield step
                if self._state.within_step:
                    raise ConfigError(
                        explain(
                            "Cannot take the next batch.",
                            "engine.step was called without engine.log after it",
                            "call engine.log once for each step",
                        )
                    )
        finally:
            batches.close()

    def micro_batches(self, batches: Sequence[Any]) -> list[MicroBatch]:
        """Turn batches that your script made into one step's list of micro-batches, on the device. Collective.

        Ranks may pass different numbers of batches, at least one each. A rank with fewer batches repeats its last
        batch with a weight of zero. A loop without `batches` must call `resume` before it computes anything.
        """
        self.resume()
        counts = self.world.group.gather_all(len(batches))
        return [to_device(micro, self.device) for micro in align_batches(batches, counts, self.world.mesh.part[0])]

    # ------------------------------------------------------------------ one step

    def accumulate(self, name: str, micro_batches: Sequence[MicroBatch], objective: Any = None) -> StepSums:
        """Run forward and backward of all micro-batches of one step. Collective.

        The gradient is that of the global batch's mean loss, exact over all ranks and micro-batches. Gradients flow
        through the other prepared models without being collected in them.

        Args:
            name: the prepared model to train.
            micro_batches: one list from `batches` or `micro_batches`.
            objective: a callable `(model, batch) -> (total, weight)` or `(total, weight, sums)`. `total` is a scalar
                tensor, the sum of the items' losses. Default: the objective that the model was prepared with.

        Returns:
            The step's sums. Reading `.loss`, the loss of the complete global batch, waits for the device.

        Raises:
            ConfigError: the model is unknown or frozen, or `micro_batches` is not a step's list.
            TrainingError: the objective returned something else, or the ranks ran different collectives.
        """
        return self._step.accumulate(name, micro_batches, objective)

    def backward(self, name: str, total: Tensor, weight: float | Tensor = 1.0) -> StepSums:
        """Run backward for a loss that your script computed. Collective.

        Args:
            name: the prepared model to train.
            total: a scalar tensor, the sum of the losses of this rank's items.
            weight: the number of this rank's items.

        Returns and raises as `accumulate`.
        """
        by_hand = MicroBatch(batch=None, index=self.world.mesh.part[0], real=True, samples=0)
        return self.accumulate(name, [by_hand], lambda model, batch: (total, weight))

    def step(self, name: str = "model") -> StepOutcome:
        """Scale and clip the gradients, step the optimizer and the schedule, and zero the gradients. Collective.

        A step whose weight is zero changes nothing and counts as skipped. The gradient is checked for finite values on
        steps that are clipped, reported or saved, before a weight changes.

        Returns:
            The outcome: `applied`, `grad_norm` before clipping, `lr`. Reading a value waits for the device.

        Raises:
            ConfigError: nothing was accumulated for this model.
            TrainingError: a checked gradient is not finite.
        """
        return self._step.step(name, self._falls_on, self.total_steps)

    def log(self, **values: float) -> None:
        """Count this step and, if it is reported, write `values` with the built-in values to metrics.jsonl. Local.

        Steps that are not reported never wait for the device.

        Args:
            **values: numbers or 0-d tensors, under names of your choice.

        Raises:
            ConfigError: a name is a built-in key of metrics.jsonl, such as `step` or `loss`. Nothing is written and
                the step is not counted, on reported steps and on others.
        """
        if values:
            self.run_log.reject_built_in(values, self._prepared)
        progress = self._state.progress
        for name, position, samples, tokens in self._taken:
            progress.positions[name] = position
            progress.samples += samples
            progress.tokens += tokens
        self._taken.clear()
        progress.steps += 1
        self._state.within_step = False
        self.run_log.ended(progress, self.total_steps, values)

    def due(self, what: str) -> bool:
        """Return whether `what`, "eval" or "checkpoint", falls on the step that just ended. Local."""
        return self._falls_on(what, self.progress.steps)

    def _falls_on(self, what: str, step: int) -> bool:
        every = self._every[what]
        return every is not None and step % every == 0

    def should_stop(self) -> bool:
        """Save if a checkpoint is due, and return whether to leave the loop. Collective.

        True once the run's steps are done, or once Ctrl-C was pressed for any rank. With `checkpoint.background` the
        call returns when the state has been copied; the copy is written while training continues.
        """
        self._state.saver.settle()
        if self.due("checkpoint"):
            self._state.save_due()
        return self._state.stopped or self.finished()

    def generator(self, name: str) -> torch.Generator:
        """Return a generator on the device, keyed by (seed, name, step) and equal on all ranks. Local."""
        key = derive_seed(self.config.run.seed, "user", name, self.progress.steps)
        return torch.Generator(self.device).manual_seed(key)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self, sets: Mapping[str, Any] | None = None, *, name: str = "model", objective: Any = None
    ) -> dict[str, float]:
        """Evaluate a model and report the values. Collective. Every sample counts once, for any world size.

        Buffers such as running statistics are first set to rank 0's on every rank, and stay so.

        Args:
            sets: datasets by name. Default: the config's `eval.sets`.
            name: the prepared model to evaluate.
            objective: as in `accumulate`.

        Returns:
            `eval/SET/loss` and `eval/SET/NAME` for each value that the objective summarizes.
        """
        prepared = self._find(name)
        share_buffers(prepared)
        values: dict[str, float] = {}
        for key, dataset in (sets if sets is not None else self._datasets.evaluation_sets).items():
            found = evaluate_set(
                self.world,
                prepared,
                self._models.objective_for(name, objective),
                dataset,
                micro_batch=self._datasets.evaluation_micro_batch(),
                collate=self._datasets.collate(),
            )
            values |= {f"eval/{key}/{measure}": value for measure, value in found.items()}
        self.run_log.evaluated(self.progress, values)
        return values

    def evaluated(self) -> bool:
        """Return whether the current step has been evaluated. Local."""
        return self.run_log.evaluated_at == self.progress.steps
