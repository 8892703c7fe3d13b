"""What a strategy is: five acts on a model that it builds itself, and nothing more.

Shaped by its hardest guests. ZeRO owns construction and FSDP2 must shard before the optimizer exists, so `prepare`
takes factories. Pipelines own a step's whole forward and backward, so `accumulate` takes the step's whole list of
micro-batches. DeepSpeed fuses clip, step, schedule and zero, so `step` is one act.
Enters: the engine. Above this contract no strategy's name and no `isinstance(strategy, ...)` appears.
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
from disttrain.objective import Objective
from disttrain.optim.named import MakeOptimizer, MakeSchedule, NamedParameter
from disttrain.runtime import Device, Group, Mesh, MeshSizes
from disttrain.strategy.call_agreement import Trail
from disttrain.strategy.step.fused_adam import FusedAdam
from disttrain.strategy.step.loss_scale import LossScale

MakeModel = Callable[[], nn.Module]


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """What every strategy stands on; `precision` and `memory` are the config's sections."""

    group: Group
    mesh: Mesh
    device: torch.device
    seed: int
    precision: PrecisionConfig
    memory: MemoryConfig

    @property
    def dtype(self) -> torch.dtype:
        """That of parameters and optimizer state."""
        return DTYPES[self.precision.master]

    @property
    def autocast(self) -> torch.dtype | None:
        """That of matrix products, None where it is the parameters' own."""
        return DTYPES[self.precision.compute] if self.precision.compute != self.precision.master else None

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled: fp16's gradients would vanish."""
        return self.precision.compute == "fp16"

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which forwards run."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@dataclass(frozen=True)
class LoadingNumber:
    """`tensor` becomes the Python number `state[key]` once it was written into."""

    state: dict[str, Any]
    key: str
    tensor: Tensor


@dataclass
class Prepared:
    """One named model, ready to train.

    `model` is what users call: their own module, changed in place at most. `named` lists the trainable parameters,
    each tensor once, those of a trainable objective under `objective.`. `wrapped` is the strategy's own.
    `members` names the parameters of each of the optimizer's groups, in the order of both. `updates` counts calls of
    `step`, skipped ones too, and `accumulations` those of `accumulate` since the last: they key the randomness of
    micro-batches. `loss_scale` is moved under fp16 alone. `loading` holds optimizer state that is a Python number while
    a checkpoint is written into tensors. `trail` is this rank's way through an accumulation or an evaluation. `fused`
    is the shorter way to step, for torch's own steps.
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
    trail: Trail = field(default_factory=Trail)
    fused: FusedAdam | None = None

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The tensors of `named`; asked once there are some."""
        return tuple(one.parameter for one in self.named)


@dataclass(frozen=True)
class StepSums:
    """What a step's micro-batches add up to over all ranks, read from the step's one all-reduce.

    `totals` and `weights` are per term; `sums` are the objective's own; `flags` are the engine's, added over ranks.
    `denominator` is what gradients are still to be divided by (1.0 where the loss was divided at once); the loss scale
    is in it, where they are `scaled`.
    """

    totals: Mapping[str, float]
    weights: Mapping[str, float]
    sums: Mapping[str, Tensor]
    flags: tuple[float, ...]
    denominator: float
    scaled: bool = False

    @property
    def loss(self) -> float:
        """Sum over the terms of total / weight; terms of weight zero count nothing."""
        return sum(self.totals[term] / weight for term, weight in self.weights.items() if weight)

    @property
    def weight(self) -> float:
        """Sum of all terms' weights: zero means that the step has nothing to learn from."""
        return sum(abs(weight) for weight in self.weights.values())

    def plus(self, more: StepSums) -> StepSums:
        """The sums of two accumulations before one step; `sums` that only one of them brings stay as they are.

        Raises ConfigError for a loss of several terms: each was divided by one accumulation's weight already.
        """
        if set(self.totals) != set(more.totals) or len(self.totals) > 1:
            raise ConfigError(
                explain(
                    "Two accumulations before one step share one weight, that of their one term.",
                    f"the terms {', '.join(self.totals)}, then {', '.join(more.totals)}",
                    "accumulate a loss of several terms once a step, or return one total and one weight",
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
    """`grad_norm` is the global 2-norm before clipping, None where nobody asked for or needed it; `lr` is the rate of
    this step's first group; `loss_scale` is that of this step, None where losses are not scaled. A step that was not
    `applied` left weights, optimizer state and schedule as they were."""

    grad_norm: float | None
    applied: bool
    lr: float = 0.0
    loss_scale: float | None = None


@dataclass(frozen=True)
class Ingredients:
    """What `prepare` builds from. Without `make_optimizer` the model is frozen (a teacher)."""

    name: str
    make_model: MakeModel
    make_optimizer: MakeOptimizer | None = None
    make_schedule: MakeSchedule | None = None
    objective: nn.Module | None = None


class AbstractStrategy(ABC):
    """Built as `Strategy(options, world)` once `check` let it pass. Methods are collective unless they say local."""

    def __init__(self, options: Any, world: World) -> None:
        self.options = options
        self.world = world

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """Refuse what this strategy cannot do in such a world, before any process group exists. Local.

        Raises ConfigError, or LaunchError where it is the environment that lacks something.
        """
        return

    @classmethod
    def check_optimizer(cls, make: MakeOptimizer, mesh: Mesh | None = None) -> None:
        """Refuse an optimizer that would step otherwise, or not at all, on what this strategy makes of parameters.

        Local, before any process group exists; with a mesh it may go further, and is collective. Raises ConfigError.
        """
        return

    @classmethod
    def check_model(cls, options: Any, sizes: MeshSizes, make_model: MakeModel) -> None:
        """Refuse a model that cannot be cut so, before any process group exists. Local; builds shapes at most.

        Raises ConfigError.
        """
        return

    @abstractmethod
    def prepare(self, ingredients: Ingredients) -> Prepared:
        """Build the model under the seed, wrap or shard it, then build optimizer and schedule over what came of it."""

    @abstractmethod
    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        """Forward and backward of the step's micro-batches; every rank brings equally many."""

    @abstractmethod
    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        """Scale, clip, step, schedule and zero as one act. A step of weight zero changes nothing."""

    @abstractmethod
    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        """The canonical boxes this rank holds of parameters, buffers and optimizer state. Local.

        With `stored` (names to shapes and dtypes of a checkpoint) missing optimizer state is created first, to be
        filled. Raises CheckpointError for state that this strategy cannot hold.
        """

    @contextmanager
    def frozen(self, prepared: Prepared) -> Iterator[None]:
        """Meanwhile gradients flow through this model and none is collected in it."""
        trainable = [named.parameter for named in prepared.named if named.parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def loaded(self, prepared: Prepared) -> None:
        """After this rank's shards were written into: bring up to date whatever is derived from them."""
        for number in prepared.loading:
            number.state[number.key] = number.tensor.item()
        prepared.loading.clear()

    @abstractmethod
    def whole(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        """Name and full value, on the CPU, of every parameter and persistent buffer of the model, one at a time."""

    def close(self) -> None:  # noqa: B027 - most strategies hold nothing that outlives the process group
        """Let go of what outlives the process group."""


def refuse_axes(strategy: str, sizes: MeshSizes, *axes: str) -> None:
    """Raise ConfigError where the mesh has more than one rank along an axis that a strategy does not know. Local."""
    for axis in axes:
        if getattr(sizes, axis) > 1:
            raise ConfigError(
                explain(
                    f"strategy.name={strategy} spreads over ranks that each have their own part of the data.",
                    f"mesh.{axis}={getattr(sizes, axis)}",
                    f"leave mesh.{axis} at 1, or use strategy.name=fsdp",
                )
            )
