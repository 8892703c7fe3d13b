"""Defines the contract of strategies: the methods that a strategy implements, and the types that they exchange.

The contract is shaped by its most demanding implementations. ZeRO controls how a model is built, and FSDP2 shards
before the optimizer exists, so `prepare` takes factories. Pipelines control a step's complete forward and backward, so
`accumulate` takes all micro-batches of the step. DeepSpeed fuses clip, step, schedule and zero, so `step` does too.

The engine calls strategies through this contract only. It knows no strategy's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disttrain.checkpoint import Shard
from disttrain.config.schema import MemoryConfig, PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, explain
from disttrain.objective import Context, Objective
from disttrain.optim.named import MakeOptimizer, MakeSchedule, NamedParameter
from disttrain.runtime import Device, Group, Mesh, MeshSizes
from disttrain.strategy.call_order import CallSequence
from disttrain.strategy.step.fused_adam import FusedAdam
from disttrain.strategy.step.loss_scale import LossScale

MakeModel = Callable[[], nn.Module]


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """The ranks, the device and the settings that every strategy works with.

    `precision` and `memory` are sections of the config.
    """

    group: Group
    mesh: Mesh
    device: torch.device
    seed: int
    precision: PrecisionConfig
    memory: MemoryConfig

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and optimizer state."""
        return DTYPES[self.precision.master]

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products, or None where it is that of the parameters."""
        return DTYPES[self.precision.compute] if self.precision.compute != self.precision.master else None

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled, because gradients in fp16 would vanish."""
        return self.precision.compute == "fp16"

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which forwards run."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@dataclass(frozen=True)
class LoadingNumber:
    """A Python number of optimizer state while it is loaded: `tensor` receives it, then it becomes `state[key]`."""

    state: dict[str, Any]
    key: str
    tensor: Tensor


@dataclass
class Prepared:
    """One named model, ready to train.

    Attributes:
        name: the model's name in the engine.
        model: the user's module, which users call. It is changed in place at most.
        objective: the trainable objective, if it is a module.
        named: the trainable parameters, each tensor once. Those of a trainable objective start with `objective.`.
        optimizer: None for a frozen model.
        members: the names of the parameters of each of the optimizer's groups, in the order of both.
        schedule: None where the rate is constant.
        wrapped: whatever the strategy keeps.
        updates: the number of calls of `step`, including steps that were skipped.
        accumulations: the number of calls of `accumulate` since the last `step`. With `updates` it determines the
            random numbers of micro-batches.
        loss_scale: changes under fp16 only.
        loading: optimizer state that is a Python number, while a checkpoint is loaded.
        calls: this rank's calls of the model's parts, in an accumulation or an evaluation.
        fused: takes the optimizer's step by torch's fused kernel, where that gives the same result.
    """

    name: str
    model: nn.Module
    objective: nn.Module | None = None
    named: tuple[NamedParameter, ...] = ()
    optimizer: Optimizer | None = None
    members: tuple[tuple[str, ...], ...] = ()
    schedule: LRScheduler | None = None
    wrapped: Any = None
    updates: int = 0
    accumulations: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    loading: list[LoadingNumber] = field(default_factory=list)
    calls: CallSequence = field(default_factory=CallSequence)
    fused: FusedAdam | None = None

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The tensors of `named`. Read it only after `named` is set: the result is cached."""
        return tuple(one.parameter for one in self.named)


@dataclass(frozen=True)
class StepSums:
    """The sums of a step's micro-batches over all ranks, read from the step's one all-reduce.

    Attributes:
        totals: summed losses by term.
        weights: numbers of samples or tokens by term.
        sums: the objective's further sums.
        flags: the engine's numbers, added up over ranks.
        denominator: what gradients must still be divided by. It contains the loss scale. It is 1.0 where the loss was
            divided at once.
        scaled: whether the losses were scaled.
    """

    totals: Mapping[str, float]
    weights: Mapping[str, float]
    sums: Mapping[str, Tensor]
    flags: tuple[float, ...]
    denominator: float
    scaled: bool = False

    @property
    def loss(self) -> float:
        """The sum over terms of total / weight. A term of weight zero counts as zero."""
        return sum(self.totals[term] / weight for term, weight in self.weights.items() if weight)

    @property
    def weight(self) -> float:
        """The sum of all terms' weights. Zero means that the step has no gradient."""
        return sum(abs(weight) for weight in self.weights.values())

    def plus(self, more: StepSums) -> StepSums:
        """Return the sums of two accumulations before one step. An entry of `sums` may be in only one of them.

        Raises ConfigError for a loss of several terms, which was already divided by one accumulation's weights.
        """
        if set(self.totals) != set(more.totals) or len(self.totals) > 1:
            raise ConfigError(
                explain(
                    "Cannot accumulate twice before one step: the loss has several terms, or other ones.",
                    f"the terms {', '.join(self.totals)}, then {', '.join(more.totals)}",
                    "accumulate a loss of several terms once per step, or return one total and one weight",
                )
            )
        shared = set(self.sums) & set(more.sums)
        return StepSums(
            {term: total + more.totals[term] for term, total in self.totals.items()},
            {term: weight + more.weights[term] for term, weight in self.weights.items()},
            {**self.sums, **more.sums, **{name: self.sums[name] + more.sums[name] for name in shared}},
            tuple(a + b for a, b in zip(self.flags, more.flags, strict=True)),
            self.denominator + more.denominator,
            self.scaled,
        )


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step.

    Attributes:
        grad_norm: the global 2-norm before clipping, or None where it was neither requested nor needed.
        applied: False where weights, optimizer state and schedule stayed as they were.
        lr: the learning rate of the first group in this step.
        loss_scale: the loss scale of this step, or None where losses are not scaled.
    """

    grad_norm: float | None
    applied: bool
    lr: float = 0.0
    loss_scale: float | None = None


@dataclass(frozen=True)
class Ingredients:
    """The factories that `prepare` calls. Without `make_optimizer` the model is frozen, as a teacher is."""

    name: str
    make_model: MakeModel
    make_optimizer: MakeOptimizer | None = None
    make_schedule: MakeSchedule | None = None
    objective: nn.Module | None = None


class ObjectiveCall(nn.Module):
    """The call of an objective on a model, as a module, for libraries that hook a module's `forward`.

    It returns the totals, weights and sums of the loss as a tuple of mappings, in which such libraries find tensors.
    """

    def __init__(self, model: nn.Module, objective: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, objective: Objective, batch: Any, context: Context) -> tuple[Any, Any, Any]:
        loss = objective(self.model, batch, context)
        return loss.totals, loss.weights, loss.sums


class AbstractStrategy(ABC):
    """The base class of strategies.

    The engine calls `check` on the class, then `Strategy(options, world)`. Methods are collective unless their
    docstring says "Local".
    """

    def __init__(self, options: Any, world: World) -> None:
        self.options = options
        self.world = world

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """Reject settings that this strategy does not support, before any process group exists. Local.

        Raises ConfigError, or LaunchError where the environment lacks something.
        """
        return

    @classmethod
    def check_optimizer(cls, make: MakeOptimizer, mesh: Mesh | None = None) -> None:
        """Reject an optimizer whose steps differ or fail on the parameters that this strategy shards.

        Local and before any process group exists. With a mesh the check may try a step, and is collective. Raises
        ConfigError.
        """
        return

    @classmethod
    def check_model(cls, options: Any, sizes: MeshSizes, make_model: MakeModel) -> None:
        """Reject a model that cannot be sharded, before any process group exists. Local; builds shapes at most.

        Raises ConfigError.
        """
        return

    @abstractmethod
    def prepare(self, ingredients: Ingredients) -> Prepared:
        """Build the model under the seed, wrap or shard it, then build its optimizer and schedule."""

    @abstractmethod
    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        """Run forward and backward of the step's micro-batches. Every rank passes the same number."""

    @abstractmethod
    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        """Scale and clip gradients, step the optimizer and the schedule, and zero gradients.

        A step of weight zero changes nothing.
        """

    @abstractmethod
    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        """Return the canonical boxes that this rank holds of parameters, buffers and optimizer state. Local.

        With `stored` (names to shapes and dtypes of a checkpoint) missing optimizer state is created first, to be
        loaded. Raises CheckpointError for state that this strategy cannot hold.
        """

    @contextmanager
    def frozen(self, prepared: Prepared) -> Iterator[None]:
        """In this context gradients flow through the model, and its parameters collect none."""
        trainable = [named.parameter for named in prepared.named if named.parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def loaded(self, prepared: Prepared) -> None:
        """Update whatever is derived from this rank's shards, after a checkpoint was loaded into them."""
        for number in prepared.loading:
            number.state[number.key] = number.tensor.item()
        prepared.loading.clear()

    @abstractmethod
    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        """Yield name and full value on the CPU of each parameter and persistent buffer of the model, one at a time."""

    def close(self) -> None:  # noqa: B027 - most strategies hold nothing that outlives the process group
        """Release whatever outlives the process group."""


def reject_axes(strategy: str, sizes: MeshSizes, *axes: str) -> None:
    """Raise ConfigError where the mesh has several ranks along an axis that a strategy does not support. Local."""
    for axis in axes:
        if getattr(sizes, axis) > 1:
            raise ConfigError(
                explain(
                    f"Cannot use strategy {strategy} with this mesh: each of its ranks needs a part of the data.",
                    f"mesh.{axis}={getattr(sizes, axis)}",
                    f"leave mesh.{axis} at 1, or use strategy.name=fsdp",
                )
            )
