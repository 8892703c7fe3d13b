"""Uses every undocumented name of DeepSpeed 0.19, each behind one function, and rejects a DeepSpeed that lacks one.

DeepSpeed documents `initialize`, its engine, `zero.Init` and `zero.GatheredParameters`. It documents no interface to
read or write the flat partitions that its optimizers step, to discard gradients, or to start again after a process
group. `probe_package` runs before the process group exists, `probe_optimizer` in `prepare`. Neither depends on the
version's number. Imports no deepspeed: every function takes the module or the object that it reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.errors import LaunchError, explain

GROUP_NAMES = (
    "_WORLD_GROUP",
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
    "_TENSOR_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP",
    "mpu",
    "mesh_device",
)
"""Module variables of deepspeed.utils.groups that hold process groups, in addition to its dictionaries."""

PACKAGE_NAMES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("DeepSpeedEngine.managed_gradient_accumulation",),  # documented, and missing before 0.19.6
    "deepspeed.comm.comm": ("cdb",),
    "deepspeed.utils.groups": GROUP_NAMES,
}

OPTIMIZER_NAMES = (
    "averaged_gradients",
    "clip_grad",
    "independent_gradient_partition_epilogue",
    "loss_scaler.cur_scale",
    "reduce_ready_partitions_and_remove_grads",
    "reset_cpu_buffers",
)
STAGES_1_AND_2_NAMES = (
    "all_grad_tensors",
    "bit16_groups",
    "cpu_offload",
    "micro_step_id",
    "parallel_partitioned_bit16_groups",
    "single_partition_of_fp32_groups",
    "update_lp_params",
)
STAGES_1_AND_2_OFFLOAD_NAMES = ("_offload_accumulated_param_ids", "accumulated_grads_in_cpu")
STAGE_3_NAMES = (
    "_offload_boundary_param_ids",
    "_partition_all_parameters",
    "_reassign_or_swap_out_partitioned_parameters",
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_partitions_flat_buffer",
    "grad_position",
    "offload_optimizer",
    "parameter_offload.get_param_coordinator",
    "persistent_parameters",
    "sub_group_to_group_id",
)
STAGES_1_AND_2_PARAMETER_NAMES = ("_hp_mapping",)
STAGE_3_PARAMETER_NAMES = ("all_gather", "ds_numel", "ds_shape", "ds_tensor.ds_numel")
MAPPING_NAMES = (
    "hp_fragment",
    "hp_fragment_address.numel",
    "hp_fragment_address.start",
    "lp_fragment_address.numel",
    "lp_fragment_address.start",
    "param_group_index",
)
COORDINATOR_NAMES = ("_invalidate_trace", "is_invalid_trace")


@dataclass(frozen=True)
class FlatRange:
    """Elements `start` to `start + count` of a flattened parameter, held in the flat tensor `flat` from `offset` on.

    `flat` belongs to the optimizer's group number `group`.
    """

    flat: Tensor
    offset: int
    start: int
    count: int
    group: int = 0

    def view_of(self, flat: Tensor) -> Tensor:
        """The range's elements in a tensor of the same layout as `flat`: the optimizer's state, for example."""
        return flat.narrow(0, self.offset, self.count)


def probe_package(deepspeed: Any) -> None:
    """Raise LaunchError for a DeepSpeed without the module variables that this module resets. Local."""
    for module, names in PACKAGE_NAMES.items():
        _require(importlib.import_module(module), names, deepspeed.__version__, f"{module}.")


def probe_optimizer(zero: Any, parameters: Sequence[nn.Parameter], *, stage: int, version: str) -> None:
    """Raise LaunchError for an optimizer of DeepSpeed's that lacks a name this module uses. Local.

    `zero` is the engine's optimizer for a ZeRO `stage`, `parameters` are those that it trains, and `version` is
    DeepSpeed's.
    """
    names = STAGE_3_NAMES if stage == 3 else STAGES_1_AND_2_NAMES
    on_parameters = STAGE_3_PARAMETER_NAMES if stage == 3 else STAGES_1_AND_2_PARAMETER_NAMES
    _require(zero, OPTIMIZER_NAMES + names, version, f"{type(zero).__name__}.")
    if stage == 3:
        coordinator = zero.parameter_offload.get_param_coordinator()
        _require(coordinator, COORDINATOR_NAMES, version, f"{type(coordinator).__name__}.")
    elif zero.cpu_offload:
        _require(zero, STAGES_1_AND_2_OFFLOAD_NAMES, version, f"{type(zero).__name__}.")
    for parameter in parameters:
        if stage < 3 and not parameter.numel():  # DeepSpeed leaves it out
            continue
        _require(parameter, on_parameters, version, "Parameter.")
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            _require(mapping, MAPPING_NAMES, version, f"{type(mapping).__name__}.")


def _require(owner: Any, names: Iterable[str], version: str, prefix: str) -> None:
    for name in names:
        try:
            reduce(getattr, name.split("."), owner)
        except AttributeError:
            raise LaunchError(
                explain(
                    "Cannot use strategy deepspeed.",
                    f"DeepSpeed {version} has no {prefix}{name}",
                    "pip install 'deepspeed>=0.19.6,<0.20', or use strategy ddp or fsdp",
                )
            ) from None


def is_stage_three(zero: Any) -> bool:
    """Whether a probed optimizer is the one of stage 3, which partitions parameters as well."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def build_no_kernels() -> None:
    """Keep DeepSpeed from compiling a kernel at its first collective. Call it before `initialize`.

    The kernel is for inference on one CPU machine. Building it takes a compiler and up to a minute, and a process that
    is killed meanwhile leaves a lock file for which every later run waits. Without this name DeepSpeed only builds it.
    """
    found = vars(importlib.import_module("deepspeed.ops")).setdefault("__compatible_ops__", {})
    found["deepspeed_shm_comm"] = False


def forget_process_group() -> None:
    """Drop the process groups in DeepSpeed's module variables, so that the next engine sets its own. Local.

    `deepspeed.comm.destroy_process_group` would destroy torch's default group too, which is not DeepSpeed's.
    """
    groups = importlib.import_module("deepspeed.utils.groups")
    for name, value in vars(groups).items():
        if name.isupper() and isinstance(value, dict):
            value.clear()
        elif name in GROUP_NAMES:
            setattr(groups, name, None)
    vars(importlib.import_module("deepspeed.comm.comm"))["cdb"] = None


def partitioner(deepspeed: Any, config: Mapping[str, Any]) -> Callable[[Iterable[nn.Parameter]], None]:
    """A function that partitions parameters for stage 3, in place: it broadcasts rank 0's values and keeps its part.

    Collective, and so is the function. `deepspeed.zero.Init(module=...)` does the same. Its construction takes ten
    times as long as to partition one parameter, so one Init is used for all where that is possible.
    The first Init also replaces `torch.nn.functional.linear` by a function that saves the parameter for its backward.
    Torch's function saves a view of the gathered weight, and so would keep the complete model from forward to backward.
    """
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)

    def partition(parameters: Iterable[nn.Parameter]) -> None:
        if hasattr(init, "_convert_to_zero_parameters"):
            init._convert_to_zero_parameters(parameters)
        else:
            deepspeed.zero.Init(module=nn.ParameterList(parameters), config_dict_or_path=config)

    return partition


def is_partitioned(tensor: Any) -> bool:
    """Whether stage 3 has partitioned this parameter."""
    return hasattr(tensor, "ds_tensor")


def global_shape(parameter: Any) -> torch.Size:
    """The shape of the complete parameter. A partitioned one's own `shape` is (0,)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def frozen_range(parameter: Any, rank: int) -> FlatRange:
    """The range that this rank holds of a parameter that stage 3 has partitioned and no optimizer steps. Local."""
    return _equal_range(parameter, parameter.ds_tensor, 0, rank)


def trained_range(zero: Any, parameter: Any, rank: int) -> FlatRange:
    """The range of a parameter that this rank's optimizer steps, in its flat master partition. Local.

    Stages 1 and 2 cut a group's parameters anywhere; a rank may hold nothing of one. Stage 3 cuts every parameter into
    equal padded ranges.
    """
    if is_stage_three(zero):
        partition, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        group = zero.sub_group_to_group_id[partition]
        return _equal_range(parameter, zero.fp32_partitioned_groups_flat[partition], offset, rank, group)
    mapping = getattr(parameter, "_hp_mapping", None)  # a parameter without elements has none
    if mapping is None:
        group = next((at for at, own in enumerate(zero.bit16_groups) if any(one is parameter for one in own)), 0)
        return FlatRange(zero.single_partition_of_fp32_groups[group], 0, 0, 0, group)
    held, local = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return FlatRange(flat, local.start, held.start, held.numel, mapping.param_group_index)


def _equal_range(parameter: Any, flat: Tensor, offset: int, rank: int, group: int = 0) -> FlatRange:
    size = parameter.ds_tensor.ds_numel
    start = min(rank * size, parameter.ds_numel)
    return FlatRange(flat, offset, start, min(size, parameter.ds_numel - start), group)


def share_masters(zero: Any) -> None:
    """Let the master partitions share the memory of the parameters, where both have one type and device. Local.

    DeepSpeed 0.19 clones them in that case too, which holds a rank's part of the parameters twice. (Stage 3 intends not
    to, but compares a device with a device's name.) DeepSpeed's copy back after a step then copies a tensor to itself.
    """
    if is_stage_three(zero):
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
    else:
        partitions = (own[dist.get_rank()] for own in zero.parallel_partitioned_bit16_groups)
        pairs = zip(zero.single_partition_of_fp32_groups, partitions, strict=True)
    shared = [master for master, own in pairs if _share(master, own)]
    for group in () if is_stage_three(zero) else zero.bit16_groups:
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None and shared:
                flat, at = zero.single_partition_of_fp32_groups[mapping.param_group_index], mapping.hp_fragment_address
                mapping.hp_fragment = flat.narrow(0, at.start, at.numel)


def _share(master: Tensor, own: Tensor) -> bool:
    same = master.dtype == own.dtype and master.device == own.device
    if same:
        master.data = own.data
    return same


def refresh_weights(zero: Any) -> None:
    """Copy the master partitions, once written from outside, to the weights that forwards read. Collective."""
    if not is_stage_three(zero):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def intercept_gradients(zero: Any, ready: Callable[..., None], end: Callable[[], None]) -> tuple[Any, Any]:
    """Make DeepSpeed's hooks call `ready(parameter, ...)` for each gradient and `end()` after a backward. Local.

    Returns the two methods that they called before: one adds a gradient to a bucket, the other reduces the last ones.
    """
    before = zero.reduce_ready_partitions_and_remove_grads, zero.independent_gradient_partition_epilogue
    zero.reduce_ready_partitions_and_remove_grads, zero.independent_gradient_partition_epilogue = ready, end
    return before


def clear_kept_gradients(zero: Any) -> None:
    """After a step: zero the gradients that DeepSpeed keeps for the next one. Local.

    DeepSpeed would add or apply them again to a parameter that the next step does not reach. Stage 3 keeps every
    parameter's last gradient; with offload, all stages keep copies on the host.
    """
    if is_stage_three(zero):
        zero.grad_partitions_flat_buffer.zero_()
        kept = [flat.grad for flat in zero.fp32_partitioned_groups_flat if flat.grad is not None]
    elif zero.cpu_offload:
        kept = [flat.grad for flat in zero.single_partition_of_fp32_groups if flat.grad is not None]
        kept += zero.accumulated_grads_in_cpu.values()
    else:
        return
    for gradient in kept:
        gradient.zero_()


def discard_gradients(zero: Any) -> None:
    """Instead of a step: drop every gradient that backwards have added up since the last one. Local."""
    zero.zero_grad()
    if is_stage_three(zero):
        zero.averaged_gradients = {}
        zero._offload_boundary_param_ids = set()
        offloads = zero.offload_optimizer
    else:
        zero.micro_step_id = -1  # DeepSpeed's INITIAL_MICRO_STEP_ID
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        offloads = zero.cpu_offload
        if offloads:
            zero._offload_accumulated_param_ids = set()
    if offloads:
        zero.reset_cpu_buffers()
    clear_kept_gradients(zero)


@contextmanager
def step_settings(zero: Any, *, divisor: float, clip_norm: float) -> Iterator[None]:
    """Within it a step divides gradients by `divisor` and clips their norm at `clip_norm` (0: no clipping). Local."""
    zero.clip_grad = clip_norm
    kept, zero.loss_scaler.cur_scale = zero.loss_scaler.cur_scale, divisor
    try:
        yield
    finally:
        zero.loss_scaler.cur_scale = kept


def forget_call_trace(zero: Any) -> None:
    """After weights were gathered outside a forward: make stage 3 record its prefetch order again. Local.

    With its recorded trace DeepSpeed 0.19 would end the next forward with a "tracing error" where a weight is tied.
    """
    coordinator = zero.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
