"""The `deepspeed` strategy: ZeRO stages 1, 2 and 3 by DeepSpeed itself, with the arithmetic of the other strategies.

DeepSpeed averages over ranks and micro-batches. Here every micro-batch back-propagates `total * world size`, and the
step's total weight is passed as the loss scale by which DeepSpeed's optimizer divides. Gradients, norm and clipping are
therefore those of `sum of losses / sum of weights`, as in every strategy. Clipping is always stated, because DeepSpeed
clips at 1.0 by default. Mixed precision is torch's autocast over float32 parameters; DeepSpeed itself computes in
float32 then.

The strategy rejects 0-d and complex parameters, and optimizers that are not elementwise or make state before their
first step. The config rejects float64, which DeepSpeed's partitions do not support.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.checkpoint import Shard
from disttrain.config.foreign.deepspeed_native import CLIP_DEFAULT, clip_left_out, ranks_of
from disttrain.config.schema import PrecisionConfig
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError, LaunchError, explain
from disttrain.logs import package_logger
from disttrain.model import build_model, says_how
from disttrain.objective import Objective
from disttrain.optim.combined import factories_of
from disttrain.optim.named import MakeOptimizer
from disttrain.optim.trials import has_early_state, is_elementwise, kind_of
from disttrain.runtime import Device, Mesh, MeshSizes
from disttrain.strategy.call_order import CallOrderCheck
from disttrain.strategy.canonical_boxes import replicated_shards
from disttrain.strategy.construction import build_on_host, equip, lay_out_rows, name_parameters, reject_changed, settle
from disttrain.strategy.contract import (
    AbstractStrategy,
    Ingredients,
    Prepared,
    StepOutcome,
    StepSums,
    World,
    reject_axes,
)
from disttrain.strategy.deepspeed import deepspeed_internals as internals
from disttrain.strategy.deepspeed.autocast_call import AutocastCall
from disttrain.strategy.deepspeed.config import bound_gathered, engine_config
from disttrain.strategy.deepspeed.construction import (
    Partition,
    fill_partitioned,
    largest_module,
    partition_built,
    with_global_shape,
)
from disttrain.strategy.deepspeed.gradient_order import BucketOrder
from disttrain.strategy.deepspeed.partitions import partition_shards
from disttrain.strategy.deepspeed.reached_parameters import agree_on_reached
from disttrain.strategy.deepspeed.requirements import (
    early_state_error,
    import_deepspeed,
    reject_early_state,
    reject_nvme,
    reject_parameters,
)
from disttrain.strategy.step.arithmetic import reject_non_finite, run_micro_batches
from disttrain.torch_internals import version_of, version_reader

_log = package_logger("strategy")


class DeepSpeed(AbstractStrategy):
    """ZeRO by DeepSpeed, with one DeepSpeed engine for each trained model."""

    @classmethod
    def check(cls, options: Any, sizes: MeshSizes, device: Device, precision: PrecisionConfig) -> None:
        """Check the package and what offload to disk needs, the mesh, and the number of ranks of a native JSON.

        The mesh may have one axis.
        """
        reject_axes("deepspeed", sizes, "replicate", "tensor")
        module = import_deepspeed(device.device)
        internals.probe_package(module)
        if options.stage == 3 and version_reader() is None:
            raise LaunchError(
                explain(
                    "Cannot use strategy deepspeed with stage 3.",
                    f"torch {torch.__version__} has no usable Tensor._version, which shows changes that would be lost",
                    "install torch 2.11 to 2.14, or use stage 1 or 2",
                )
            )
        if "nvme" in (options.offload, options.offload_parameters):
            reject_nvme(module)
        ranks = ranks_of(options.native)
        if ranks not in (None, sizes.data_parallel):
            raise ConfigError(
                explain(
                    "Cannot use the batch sizes of strategy.deepspeed.native: train_batch_size = micro-batch x "
                    "accumulation x ranks.",
                    f"sizes for {ranks} rank(s), in a world of {sizes.data_parallel}",
                    "remove gradient_accumulation_steps from the JSON, or start as many processes",
                )
            )

    @classmethod
    def check_optimizer(cls, make: MakeOptimizer, mesh: Mesh | None = None) -> None:
        """Check that the optimizer treats every element by itself, and makes no state before its first step.

        DeepSpeed replaces its parameters by flat parts, and steps those.
        """
        for one in factories_of(make):
            kind = kind_of(one)
            name = kind.__qualname__ if kind else "the optimizer"
            if has_early_state(one):
                raise early_state_error(name)
            if not is_elementwise(one):
                raise ConfigError(
                    explain(
                        "Cannot use this optimizer under strategy deepspeed, which steps flat parts of parameters.",
                        f"{name} needs a complete parameter for its step",
                        "use strategy ddp, or an elementwise optimizer such as AdamW or SGD",
                    )
                )

    def __init__(self, options: Any, world: World) -> None:
        super().__init__(options, world)
        self._deepspeed = import_deepspeed(world.device)
        self._replaced_linear: Callable[..., Tensor] | None = None
        self._orders: dict[str, CallOrderCheck] = {}
        self._bucket_orders: dict[str, BucketOrder] = {}
        self._versions: dict[str, list[int | None]] = {}
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
        equip(prepared, ingredients, tuple(map(with_global_shape, named)))
        if prepared.optimizer is None:
            return prepared
        reject_early_state(prepared.optimizer)
        engine = self._initialize(prepared, prepared.optimizer)
        zero, stage = engine.optimizer, self.options.stage
        internals.probe_optimizer(zero, prepared.parameters, stage=stage, version=self._deepspeed.__version__)
        internals.share_masters(zero)
        prepared.wrapped = engine
        if self.world.group.size > 1:
            self._bucket_orders[prepared.name] = BucketOrder(zero, prepared.parameters)
        if stage == 3 and self.world.group.size > 1:
            gathered = [
                (name, module)
                for name, module in engine.module.named_modules()
                if next(module.parameters(recurse=False), None) is not None
            ]
            self._orders[prepared.name] = CallOrderCheck(gathered)
        return prepared

    def _build(self, ingredients: Ingredients) -> nn.Module:
        """Build the model; under stage 3, partition what will be trained. Collective."""
        device, seed = self.world.device, self.world.seed
        partitions = self.options.stage == 3 and ingredients.make_optimizer is not None
        if not partitions or not says_how(ingredients.make_model):
            model = build_on_host(self.world, ingredients)
            reject_parameters(model, stage=3 if partitions else 0)
            lay_out_rows(model)
            if not partitions:
                return model.to(device)
            partition_built(model, device, self._partition())
            return model
        model = build_model(ingredients.make_model, seed=seed, meta=True)
        settle(self.world, model)
        reject_parameters(model, stage=3)
        fill_partitioned(model, device, self._partition(), seed=seed)
        return model

    def _partition(self) -> Partition:
        """The function that partitions parameters, with a note of the linear function that DeepSpeed replaces."""
        before = torch.nn.functional.linear
        partition = internals.partitioner(self._deepspeed, self._config)
        if torch.nn.functional.linear is not before:
            self._replaced_linear = before
        return partition

    def _initialize(self, prepared: Prepared, optimizer: Optimizer) -> Any:
        """Wrap the model and its optimizer in an engine of DeepSpeed's. Collective."""
        config = self._config
        if self.options.stage == 3:
            config = bound_gathered(config, largest_module(prepared.model, prepared.objective))
        with warnings.catch_warnings():
            # DeepSpeed 0.19 uses names that torch 2.13 deprecates. Users cannot change that.
            warnings.simplefilter("ignore", FutureWarning)
            engine, *_ = self._deepspeed.initialize(
                model=AutocastCall(prepared.model, prepared.objective, self.world, cache=self.options.stage < 3),
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
        return engine

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
            # DeepSpeed warns of, and leaves, an autocast that it did not enter. `AutocastCall` enters it inside.
            with torch.autocast(self.world.device.type, enabled=False):
                return engine(*call)

        self._reject_changed(prepared, "between steps")
        order = self._orders.get(prepared.name)
        checked = order.checked if order is not None else nullcontext
        step = self.world, prepared, micro_batches, objective, flags
        sums = run_micro_batches(*step, through=through, backward=backward, checked=checked)
        self._reject_changed(prepared, "in the forward")
        return sums

    def _reject_changed(self, prepared: Prepared, when: str) -> None:
        """Raise TrainingError for parameters that were written into since the last call, under stage 3.

        Stage 3 has partitioned such a parameter, or will do so again, and the change is lost. Torch counts all writes
        except DeepSpeed's.
        """
        if self.options.stage < 3:
            return
        versions = [version_of(parameter) for parameter in prepared.parameters]
        before = self._versions.setdefault(prepared.name, versions)
        if versions != before:
            pairs = zip(prepared.named, versions, before, strict=True)
            reject_changed([one.name for one, now, then in pairs if now != then], when, "deepspeed stage 3")

    def step(self, prepared: Prepared, sums: StepSums, *, clip_norm: float | None, want_norm: bool) -> StepOutcome:
        engine = prepared.wrapped
        zero = engine.optimizer
        prepared.updates += 1
        prepared.accumulations = 0
        rate = float(zero.param_groups[0]["lr"])
        if sums.weight == 0.0:
            internals.discard_gradients(zero)
            return StepOutcome(None, applied=False, lr=rate)
        with internals.step_settings(zero, divisor=sums.denominator, clip_norm=float(clip_norm or 0.0)):
            engine.step()
        internals.clear_kept_gradients(zero)
        norm = float(engine.get_global_grad_norm() or 0.0)
        finite = engine.was_step_applied() and math.isfinite(norm)
        loss_scale = prepared.loss_scale.value if sums.scaled else None
        if sums.scaled:
            prepared.loss_scale.update(finite=finite, weight=sums.weight)
        elif not finite:
            reject_non_finite(f"a gradient norm of {norm}")
        if not finite:  # all ranks see the same, because the norm is that of all ranks
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
            internals.refresh_weights(prepared.wrapped.optimizer)
            self._versions.pop(prepared.name, None)

    def close(self) -> None:
        """Make DeepSpeed forget the process group, so that this process can make another engine."""
        internals.forget_process_group()
        if self._replaced_linear is not None:
            torch.nn.functional.linear = self._replaced_linear

    def full_weights(self, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
        model = prepared.model
        for name, tensor in model.state_dict(keep_vars=True).items():
            with self._deepspeed.zero.GatheredParameters([tensor], enabled=internals.is_partitioned(tensor)):
                yield name, tensor.detach().to("cpu", copy=True)
        if prepared.wrapped is not None and self.options.stage == 3:
            internals.forget_call_trace(prepared.wrapped.optimizer)
