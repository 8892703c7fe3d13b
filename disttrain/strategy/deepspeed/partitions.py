"""Canonical boxes of ZeRO's flat partitions: each rank holds a flat range of a parameter, cut into boxes.

Stages 1 and 2 keep one flat float32 partition a group, in which a parameter's range begins anywhere; stage 3 cuts every
parameter into equal padded ranges. Imports no deepspeed: it reads the optimizer that DeepSpeed made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.checkpoint import Box, Shard, flat_range_to_boxes, full_shard
from disttrain.strategy.canonical_boxes import NUMBER, home_of_scalar, number_tensors, refuse_opaque
from disttrain.strategy.contract import Prepared
from disttrain.strategy.deepspeed.gradients import is_stage_three


@dataclass(frozen=True)
class _Range:
    """Elements `start` to `start + count` of a flat parameter lie at `place` in the flat tensor `flat`, which is of the
    optimizer's `group`-th group."""

    flat: Tensor
    place: int
    start: int
    count: int
    group: int = 0

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.place, self.count)


def partition_shards(prepared: Prepared, stored: Mapping[str, Any] | None, *, rank: int, size: int) -> list[Shard]:
    """Boxes of parameters, buffers and optimizer state that this rank holds. Local."""
    zero = prepared.wrapped.optimizer
    shards: list[Shard] = []
    trained = {id(named.parameter): named for named in prepared.named}
    for kind, module in (("model", prepared.model), ("objective", prepared.objective)):
        parameter: Any
        for name, parameter in module.named_parameters() if module is not None else ():
            full = f"{kind}/{prepared.name}/{name}"
            if id(parameter) in trained:
                found = _range_of(zero, parameter, rank)
                shape = tuple(trained[id(parameter)].shape)
                shards += _cut(full, shape, found, found.flat)
                shards += _optimizer_shards(
                    prepared, zero, trained[id(parameter)].name, shape, found, stored, rank, size
                )
            elif hasattr(parameter, "ds_tensor"):
                shape = tuple(parameter.ds_shape)
                shards += _cut(full, shape, _equal_range(parameter, parameter.ds_tensor, 0, rank), parameter.ds_tensor)
            else:
                shards.append(full_shard(full, parameter.detach(), (rank, size)))
        state = set(module.state_dict()) if module is not None else set()
        for name, buffer in module.named_buffers() if module is not None else ():
            if name in state:
                shards.append(full_shard(f"{kind}/{prepared.name}/{name}", buffer, (rank, size)))
    return shards


def share_masters(zero: Any) -> None:
    """Let the flat partitions that the optimizer steps on lie in the parameters' own memory, where the type is one.

    DeepSpeed 0.19 clones them there too (stage 3 means not to, but compares a device with its name): a rank's part of
    the parameters twice. Its copy back after a step is then onto itself. Local.
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


def spread_loaded(prepared: Prepared) -> None:
    """After partitions were written: bring what forwards read up to date with them. Collective."""
    zero = prepared.wrapped.optimizer
    if not is_stage_three(zero):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _range_of(zero: Any, parameter: Any, rank: int) -> _Range:
    if is_stage_three(zero):
        part, place, _ = zero.grad_position[zero.get_param_id(parameter)]
        found = _equal_range(parameter, zero.fp32_partitioned_groups_flat[part], place, rank)
        return replace(found, group=zero.sub_group_to_group_id[part])
    mapping = parameter._hp_mapping
    if mapping is None:
        group = next(i for i, own in enumerate(zero.bit16_groups) if any(one is parameter for one in own))
        return _Range(zero.single_partition_of_fp32_groups[group], 0, 0, 0, group)
    held, local = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Range(flat, local.start, held.start, held.numel, mapping.param_group_index)


def _equal_range(parameter: Any, flat: Tensor, place: int, rank: int) -> _Range:
    size = parameter.ds_tensor.ds_numel
    start = min(rank * size, parameter.ds_numel)
    return _Range(flat, place, start, min(size, parameter.ds_numel - start))


def _cut(name: str, shape: tuple[int, ...], found: _Range, flat: Tensor) -> Iterator[Shard]:
    """The flat range as boxes, each a view of what the optimizer steps on."""
    held = found.of(flat).detach()
    boxes = flat_range_to_boxes(shape, found.start, found.start + found.count)
    at = 0
    for box in boxes:
        yield Shard(name, shape, box, held.narrow(0, at, box.numel).view(box.sizes))
        at += box.numel
    if not boxes:
        empty = Box((0,) * len(shape), (0,) * len(shape))
        yield Shard(name, shape, empty, held.new_empty(empty.sizes))


def _optimizer_shards(
    prepared: Prepared,
    zero: Any,
    parameter: str,
    shape: tuple[int, ...],
    found: _Range,
    stored: Mapping[str, Any] | None,
    rank: int,
    size: int,
) -> Iterator[Shard]:
    prefix = f"optim/{prepared.name}/{parameter}:"
    state = zero.optimizer.state[found.flat]
    for name, info in (stored or {}).items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and not name.endswith(NUMBER) and key not in state:
            if info.shape and tuple(info.shape) != shape:
                refuse_opaque(name, torch.empty(info.shape, device="meta"))
            group = zero.optimizer.param_groups[found.group]
            home = found.flat.device if info.shape else home_of_scalar(group, found.flat, key)
            sizes = found.flat.shape if info.shape else ()
            state[key] = torch.zeros(sizes, dtype=info.dtype, device=home)
    for name, number in number_tensors(prepared, state, prefix, stored):
        yield full_shard(name, number, (rank, size))
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == found.flat.shape:
            yield from _cut(prefix + key, shape, found, value)
        elif value.dim() == 0:
            yield full_shard(prefix + key, value, (rank, size))
        else:
            refuse_opaque(prefix + key, value)
