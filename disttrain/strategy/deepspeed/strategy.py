"""`deepspeed`: ZeRO stages 1, 2 and 3 by the real DeepSpeed, with our arithmetic. The only file that imports deepspeed.

DeepSpeed averages over ranks and micro-batches; here every micro-batch back-propagates `total * world size`, and the
step's whole weight goes in as the loss scale that its optimizer divides by, so that gradients, norm and clipping are
those of `sum of losses / sum of weights`, as everywhere. Clipping is always stated: left out, DeepSpeed clips at 1.0.
Mixed precision is torch's autocast over float32 parameters, as in every strategy; DeepSpeed knows of float32 then.
Refuses 0-d and complex parameters, and optimizers that are not elementwise; float64, which its partitions do not know,
is refused with the config.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.checkpoint import Shard
from disttrain.config.foreign.deepspeed_native import CLIP_DEFAULT, clip_left_out, ranks_of
from disttrain.config.schema import PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, LaunchError, explain
from disttrain.logs import package_logger
from disttrain.model import build_model, says_how
from disttrain.objective import Context, Objective
from disttrain.optim.combined import factories_of
from disttrain.optim.named import MakeOptimizer
from disttrain.optim.trials import is_elementwise, kind_of
from disttrain.runtime import Device, Mesh, MeshSizes, export_for_libraries, read_launch
from disttrain.strategy.call_order import CallOrder
from disttrain.strategy.canonical_boxes import replicated_shards
from disttrain.strategy.construction import build_on_host, equip, lay_out_rows, name_parameters, refuse_changed, settle
from disttrain.strategy.contract import (
    AbstractStrategy,
    Ingredients,
    Prepared,
    StepOutcome,
    StepSums,
    World,
    refuse_axes,
)
from disttrain.strategy.deepspeed.config import bound_gathered, engine_config
from disttrain.strategy.deepspeed.construction import cut_whole, fill_cut, largest_module, with_whole_shape
from disttrain.strategy.deepspeed.gradient_order import BucketOrder
from disttrain.strategy.deepspeed.gradients import discard_step, forget_step
from disttrain.strategy.deepspeed.optimizer import move_early_state, refuse_early_state, seen_as_any_other
from disttrain.strategy.deepspeed.partitions import partition_shards, share_masters, spread_loaded
from disttrain.strategy.deepspeed.reached_parameters import agree_on_reached
from disttrain.strategy.objective_call import ObjectiveCall
from disttrain.strategy.step.arithmetic import refuse_non_finite, run_micro_batches

_log = package_logger("strategy")

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
        """The package is there and can be imported, with what offloading to disk needs; the mesh is of one axis, and
        of as many ranks as a native JSON counts."""
        refuse_axes("deepspeed", sizes, "replicate", "tensor")
        module = _import_deepspeed(device.device)
        if "nvme" in (options.offload, options.offload_parameters):
            _refuse_nvme(module)
        ranks = ranks_of(options.native)
        if ranks not in (None, sizes.data_parallel):
            raise ConfigError(
                explain(
                    "strategy.deepspeed.native gives train_batch_size = micro-batch x accumulation x ranks.",
                    f"sizes for {ranks} rank(s), in a world of {sizes.data_parallel}",
                    "take gradient_accumulation_steps out of the JSON, or start as many processes",
                )
            )

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
        self._orders: dict[str, CallOrder] = {}
        self._bucket_orders: dict[str, BucketOrder] = {}
        self._versions: dict[str, list[int]] = {}
        self._config = engine_config(options, world.precision, world.device.type)
        if clip_left_out(options.native):
            _log.info(
                "native JSON without gradient_clipping: DeepSpeed alone would clip at %s, here optim.clip_norm decides",
                CLIP_DEFAULT,
            )

    def prepare(self, ingredients: Ingredients) -> Prepared:
        model = self._build(ingredients)
        prepared = Prepared(ingredients.name, model, ingredients.objective)
        named = name_parameters(model, ingredients.objective)
        equip(prepared, ingredients, tuple(map(with_whole_shape, named)))
        if prepared.optimizer is None:
            return prepared
        refuse_early_state(prepared.optimizer)
        config = self._config
        if self.options.stage == 3:
            config = bound_gathered(config, largest_module(model, ingredients.objective))
        with warnings.catch_warnings(), seen_as_any_other(prepared.optimizer):
            # DeepSpeed 0.19 touches what torch 2.13 deprecates; nothing a user could mend.
            warnings.simplefilter("ignore", FutureWarning)
            engine, *_ = self._deepspeed.initialize(
                model=_Call(model, ingredients.objective, self.world, keeps=self.options.stage < 3),
                optimizer=prepared.optimizer,
                config=config,
                dist_init_required=False,
            )
        share_masters(engine.optimizer)
        move_early_state(prepared.optimizer, engine.optimizer)
        prepared.wrapped = engine
        if self.world.group.size > 1:
            self._bucket_orders[prepared.name] = BucketOrder(engine.optimizer, prepared.parameters)
        if self.options.stage == 3 and self.world.group.size > 1:
            cut = [
                (name, one)
                for name, one in engine.module.named_modules()
                if next(one.parameters(recurse=False), None) is not None
            ]
            self._orders[prepared.name] = CallOrder(cut)
        return prepared

    def _build(self, ingredients: Ingredients) -> nn.Module:
        device, seed = self.world.device, self.world.seed
        cuts = self.options.stage == 3 and ingredients.make_optimizer is not None
        if not cuts or not says_how(ingredients.make_model):
            model = build_on_host(self.world, ingredients)
            _refuse_parameters(model, cut=cuts)
            lay_out_rows(model)
            if not cuts:
                return model.to(device)
            cut_whole(model, device, self._cutting())
            return model
        model = build_model(ingredients.make_model, seed=seed, meta=True)
        settle(self.world, model)
        _refuse_parameters(model, cut=True)
        fill_cut(model, device, self._cutting(), seed=seed)
        return model

    def _cutting(self) -> Any:
        """DeepSpeed's `zero.Init` for stage 3. Given a module, here one of no parameters, it puts a linear function in
        torch's place that keeps the parameter for its backward: torch's own keeps a view of the whole weight, and so
        the whole model in memory from forward to backward."""
        return self._deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=self._config)

    def accumulate(
        self, prepared: Prepared, micro_batches: Sequence[MicroBatch], objective: Objective, flags: Sequence[float] = ()
    ) -> StepSums:
        engine = prepared.wrapped
        world_size = self.world.group.size

        def backward(total: Tensor) -> None:
            if world_size > 1:
                self._bucket_orders[prepared.name].expect(agree_on_reached(total, prepared.named))
            engine.backward(total * world_size)

        def through(*call: Any) -> Any:
            # DeepSpeed ends an autocast that it did not enter, with a warning; `_Call` enters it inside.
            with torch.autocast(self.world.device.type, enabled=False):
                return engine(*call)

        if self.options.stage == 3:
            self._refuse_changed(prepared, "between steps")
        order = self._orders.get(prepared.name)
        watched = order.watched if order is not None else nullcontext
        step = self.world, prepared, micro_batches, objective, flags
        sums = run_micro_batches(*step, through=through, backward=backward, watched=watched)
        if self.options.stage == 3:
            self._refuse_changed(prepared, "in the forward")
        return sums

    def _refuse_changed(self, prepared: Prepared, when: str) -> None:
        """TrainingError for parameters that torch has seen written into since the last time: where stage 3 has cut one,
        or will cut it again, that is lost. DeepSpeed's own writes torch does not see."""
        versions = [parameter._version for parameter in prepared.parameters]
        before = self._versions.setdefault(prepared.name, versions)
        if versions != before:
            pairs = zip(prepared.named, versions, before, strict=True)
            refuse_changed([one.name for one, now, then in pairs if now != then], when, "deepspeed stage 3")

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
        finite = engine.was_step_applied() and math.isfinite(norm)
        loss_scale = prepared.loss_scale.value if sums.scaled else None
        if sums.scaled:
            prepared.loss_scale.update(finite=finite, weight=sums.weight)
        elif not finite:
            refuse_non_finite(f"a gradient norm of {norm}")
        if not finite:  # all ranks see the same: the norm is that of all
            return StepOutcome(None, applied=False, lr=rate, loss_scale=loss_scale)
        if prepared.schedule is not None:
            prepared.schedule.step()
        return StepOutcome(norm, applied=True, lr=rate, loss_scale=loss_scale)

    def shards(self, prepared: Prepared, stored: Mapping[str, Any] | None = None) -> list[Shard]:
        group = self.world.group
        if prepared.wrapped is None:
            return replicated_shards(prepared, stored, replica=(group.rank, group.size))
        return partition_shards(prepared, stored, rank=group.rank, size=group.size)

    def loaded(self, prepared: Prepared) -> None:
        super().loaded(prepared)
        if prepared.wrapped is not None:
            spread_loaded(prepared)
            self._versions.pop(prepared.name, None)

    def close(self) -> None:
        """Make DeepSpeed forget the process group, so that a later engine in this process starts afresh."""
        groups = importlib.import_module("deepspeed.utils.groups")
        for name, value in vars(groups).items():
            if name.isupper() and isinstance(value, dict):
                value.clear()
            elif name in _GROUPS_KEPT:
                setattr(groups, name, None)
        vars(importlib.import_module("deepspeed.comm.comm"))["cdb"] = None
        linear = getattr(self._deepspeed.zero.Init, "linear_bk", None)
        if linear is not None:  # stage 3 puts its own linear layer in torch's place, for good
            torch.nn.functional.linear = linear

    def whole(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        model = prepared.model
        for name, tensor in model.state_dict(keep_vars=True).items():
            with self._deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                yield name, tensor.detach().to("cpu", copy=True)
        if prepared.wrapped is not None and self.options.stage == 3:
            # By the trace of calls that it has, DeepSpeed 0.19 then ends in a "tracing error" where a weight is tied.
            coordinator = prepared.wrapped.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()


class _Call(ObjectiveCall):
    """The call under the world's autocast. Where a cast weight is not kept (`keeps`), stage 3's cut ones do not stay in
    memory whole, in another type, from forward to backward."""

    def __init__(self, model: nn.Module, objective: nn.Module | None, world: World, *, keeps: bool) -> None:
        super().__init__(model, objective)
        self._device, self._dtype, self._keeps = world.device.type, world.autocast, keeps

    def forward(self, objective: Objective, batch: Any, context: Context) -> tuple[Any, Any, Any]:
        if self._dtype is None:
            return super().forward(objective, batch, context)
        with torch.autocast(self._device, dtype=self._dtype, cache_enabled=self._keeps):
            return super().forward(objective, batch, context)


def _refuse_parameters(model: nn.Module, *, cut: bool) -> None:
    """DeepSpeed 0.19 looks at every parameter as bytes, which torch cannot do with 0 dimensions, drops the imaginary
    part of a complex one without a word, works in one type, and stage 3 waits for one without elements in vain."""
    kinds = {parameter.dtype: name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    several = [f"{name} of {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items()]
    for what, names in (
        ("several types of", several if len(several) > 1 else []),
        ("0-d", [name for name, parameter in model.named_parameters() if parameter.dim() == 0]),
        ("complex", [name for name, parameter in model.named_parameters() if parameter.is_complex()]),
        ("empty", [name for name, parameter in model.named_parameters() if cut and not parameter.numel()]),
    ):
        if names:
            raise ConfigError(
                explain(
                    "strategy.name=deepspeed trains real parameters of one type and at least one dimension, not empty "
                    "in stage 3.",
                    f"{what} parameters {', '.join(names)}",
                    "use strategy ddp, which takes them as they are, or give them another shape or type",
                )
            )


def _refuse_nvme(deepspeed: Any) -> None:
    """Raise LaunchError for what DeepSpeed's asynchronous file access lacks here; ConfigError where it has it all."""
    asked = "strategy.deepspeed offloads to nvme."
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        found = "no libaio with its headers, or no compiler: DeepSpeed cannot build its async_io"
        raise LaunchError(explain(asked, found, "apt-get install libaio-dev g++ ninja-build, or use offload=cpu"))
    found = f"state on disk, which checkpoints cannot reach yet (deepspeed {deepspeed.__version__} has its async_io)"
    raise ConfigError(explain(asked, found, "use strategy.deepspeed.offload=cpu until a later release"))


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a word of DeepSpeed's is worth a line a rank: that an optimizer is untested is not, ours are tried."""
    return "untested optimizer" not in record.getMessage()


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
    logger = importlib.import_module("deepspeed.utils.logging").logger
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, at every step; nothing a user could mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # No op is compiled at first use: the one that would be serves inference on a CPU only, takes a compiler, up to a
    # minute, and a lock file for whose removal every later run waits if a kill leaves it behind.
    vars(importlib.import_module("deepspeed.ops")).setdefault("__compatible_ops__", {})
    return module
