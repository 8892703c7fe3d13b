"""`deepspeed`: ZeRO stages 1, 2 and 3 by the real DeepSpeed, with our arithmetic. The only file that imports deepspeed.

DeepSpeed averages over ranks and micro-batches; here every micro-batch back-propagates `total * world size`, and the
step's whole weight goes in as the loss scale that its optimizer divides by, so that gradients, norm and clipping are
those of `sum of losses / sum of weights`, as everywhere. Clipping is always stated: left out, DeepSpeed clips at 1.0.
Refuses 0-d and complex parameters, and optimizers that are not elementwise; float64 and autocast, which its partitions
do not know, are refused with the config.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.checkpoint import Shard
from disttrain.config.schema import PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, explain
from disttrain.objective import Objective
from disttrain.optim.named import MakeOptimizer
from disttrain.optim.several import factories_of
from disttrain.optim.trials import is_elementwise, kind_of
from disttrain.runtime import Device, Mesh, MeshSizes, export_for_libraries, read_launch
from disttrain.strategy.arithmetic import refuse_non_finite, run_micro_batches
from disttrain.strategy.call import ObjectiveCall
from disttrain.strategy.construction import build_on_host, equip, name_parameters
from disttrain.strategy.contract import (
    AbstractStrategy,
    Ingredients,
    Prepared,
    StepOutcome,
    StepSums,
    World,
    refuse_axes,
)
from disttrain.strategy.reached import agree_on_reached
from disttrain.strategy.state import replicated_shards
from disttrain.strategy.zero_config import engine_config
from disttrain.strategy.zero_gradients import discard_step, forget_step
from disttrain.strategy.zero_partitions import partition_shards, spread_loaded

_GROUPS_KEPT = (
    "_WORLD_GROUP",
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
    "_TENSOR_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP",
    "mpu",
    "mesh_device",
)
"""What deepspeed.utils.groups (0.19) keeps at module level, beside dictionaries."""


class DeepSpeed(AbstractStrategy):
    """One DeepSpeed engine for each model that is trained."""

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """The package is there and can be imported; the mesh is of one axis."""
        refuse_axes("deepspeed", sizes, "replicate", "tensor")
        _import_deepspeed(device.device)

    @classmethod
    def check_optimizer(cls, make: MakeOptimizer, mesh: Mesh | None = None) -> None:
        """It treats every element by itself: what DeepSpeed steps on are flat parts."""
        for one in factories_of(make):
            if not is_elementwise(one):
                kind = kind_of(one)
                raise ConfigError(
                    explain(
                        "strategy.name=deepspeed cuts parameters into flat parts, each stepped by itself.",
                        f"{kind.__qualname__ if kind else 'an optimizer'}, which looks at a whole parameter",
                        "use strategy ddp, or an elementwise optimizer such as AdamW or SGD",
                    )
                )

    def __init__(self, options: Any, world: World) -> None:
        super().__init__(options, world)
        self._deepspeed = _import_deepspeed(world.device)

    def prepare(self, ingredients: Ingredients) -> Prepared:
        model = build_on_host(self.world, ingredients).to(self.world.device)
        _refuse_parameters(model)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        equip(prepared, ingredients, name_parameters(model, ingredients.objective))
        if prepared.optimizer is None:
            return prepared
        with warnings.catch_warnings():
            # DeepSpeed 0.19 touches what torch 2.13 deprecates; nothing a user could mend.
            warnings.simplefilter("ignore", FutureWarning)
            engine, *_ = self._deepspeed.initialize(
                model=ObjectiveCall(model, ingredients.objective),
                optimizer=prepared.optimizer,
                config=engine_config(self.options, self.world.precision, self.world.device.type),
                dist_init_required=False,
            )
        prepared.wrapped = engine
        return prepared

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        engine = prepared.wrapped
        world_size = self.world.group.size

        def backward(total: Tensor) -> None:
            if world_size > 1:
                agree_on_reached(total, prepared.named)
            engine.backward(total * world_size)

        step = self.world, prepared, micro_batches, objective, flags
        return run_micro_batches(*step, through=engine, backward=backward)

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        engine = prepared.wrapped
        zero = engine.optimizer
        prepared.updates += 1
        prepared.accumulations = 0
        rate = float(zero.optimizer.param_groups[0]["lr"])
        if sums.weight == 0.0:
            discard_step(zero)
            return StepOutcome(None, applied=False, lr=rate)
        zero.clip_grad = float(clip_norm or 0.0)
        kept, zero.loss_scaler.cur_scale = zero.loss_scaler.cur_scale, sums.denominator
        try:
            engine.step()
        finally:
            zero.loss_scaler.cur_scale = kept
        forget_step(zero)
        norm = float(engine.get_global_grad_norm() or 0.0)
        if not engine.was_step_applied() or not math.isfinite(norm):
            refuse_non_finite(f"a gradient norm of {norm}")
        if prepared.schedule is not None:
            prepared.schedule.step()
        return StepOutcome(norm, applied=True, lr=rate)

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        group = self.world.group
        if prepared.wrapped is None:
            return replicated_shards(prepared, stored, replica=(group.rank, group.size))
        return partition_shards(prepared, stored, rank=group.rank, size=group.size)

    def loaded(self, prepared: Prepared) -> None:
        super().loaded(prepared)
        if prepared.wrapped is not None:
            spread_loaded(prepared)

    def close(self) -> None:
        """Make DeepSpeed forget the process group, so that a later engine in this process starts afresh."""
        groups = importlib.import_module("deepspeed.utils.groups")
        for name, value in vars(groups).items():
            if name.isupper() and isinstance(value, dict):
                value.clear()
            elif name in _GROUPS_KEPT:
                setattr(groups, name, None)
        vars(importlib.import_module("deepspeed.comm.comm"))["cdb"] = None

    def whole(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        model = prepared.model
        for name, tensor in model.state_dict(keep_vars=True).items():
            with self._deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                yield name, tensor.detach().to("cpu", copy=True)


def _refuse_parameters(model: nn.Module) -> None:
    """DeepSpeed 0.19 looks at every parameter as bytes, which torch cannot do with 0 dimensions, and drops the
    imaginary part of a complex one without a word."""
    for what, names in (
        ("0-d", [name for name, parameter in model.named_parameters() if parameter.dim() == 0]),
        ("complex", [name for name, parameter in model.named_parameters() if parameter.is_complex()]),
    ):
        if names:
            raise ConfigError(
                explain(
                    "strategy.name=deepspeed trains real parameters of at least one dimension.",
                    f"{what} parameters {', '.join(names)}",
                    "use strategy ddp or fsdp, which take them as they are, or give them another shape or type",
                )
            )


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told which accelerator it stands on, and quiet. Raises ConfigError with the install line."""
    export_for_libraries(read_launch(), {"DS_ACCELERATOR": device.type, "DS_BUILD_OPS": "0"})
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            explain(
                "strategy.name=deepspeed needs the package deepspeed.",
                str(error),
                "pip install --no-build-isolation 'disttrain[deepspeed]'",
            )
        ) from error
    importlib.import_module("deepspeed.utils.logging").logger.setLevel(logging.WARNING)
    # No op is compiled at first use: the one that would be serves inference on a CPU only, takes a compiler, up to a
    # minute, and a lock file for whose removal every later run waits if a kill leaves it behind.
    vars(importlib.import_module("deepspeed.ops")).setdefault("__compatible_ops__", {})
    return module
