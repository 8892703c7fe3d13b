"""Describes ZeRO's flat partitions as canonical boxes, the form in which checkpoints store them.

Each rank holds a flat range of a parameter, which is cut into boxes. Imports no deepspeed: it reads the optimizer that
DeepSpeed made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint import Box, Shard, flat_range_to_boxes, full_shard
from disttrain.strategy.canonical_boxes import NUMBER, home_of_scalar, number_tensors, reject_opaque
from disttrain.strategy.contract import Prepared
from disttrain.strategy.deepspeed.deepspeed_internals import (
    FlatRange,
    frozen_range,
    global_shape,
    is_partitioned,
    trained_range,
)


def partition_shards(prepared: Prepared, stored: Mapping[str, Any] | None, *, rank: int, size: int) -> list[Shard]:
    """The boxes of parameters, buffers and optimizer state that this rank holds. Local.

    With `stored` (names to shapes and dtypes of a checkpoint), missing optimizer state is created first.
    """
    zero = prepared.wrapped.optimizer
    replica = (rank, size)
    shards: list[Shard] = []
    trained = {id(named.parameter): named for named in prepared.named}
    for kind, module in (("model", prepared.model), ("objective", prepared.objective)):
        for name, parameter in module.named_parameters() if module is not None else ():
            full_name = f"{kind}/{prepared.name}/{name}"
            named = trained.get(id(parameter))
            if named is not None:
                shape, held = tuple(named.shape), trained_range(zero, parameter, rank)
                shards += _cut(full_name, shape, held, held.flat)
                prefix = f"optim/{prepared.name}/{named.name}:"
                state = prepared.optimizer.state[held.flat] if prepared.optimizer is not None else {}
                _create_missing(prepared, state, held, shape, prefix, stored or {})
                for key, number in number_tensors(prepared, state, prefix, stored):
                    shards.append(full_shard(key, number, replica))
                shards += _state_shards(state, held, shape, prefix, replica)
            elif is_partitioned(parameter):
                held = frozen_range(parameter, rank)
                shards += _cut(full_name, tuple(global_shape(parameter)), held, held.flat)
            else:
                shards.append(full_shard(full_name, parameter.detach(), replica))
        persistent = set(module.state_dict()) if module is not None else set()
        for name, buffer in module.named_buffers() if module is not None else ():
            if name in persistent:
                shards.append(full_shard(f"{kind}/{prepared.name}/{name}", buffer, replica))
    return shards


def _cut(name: str, shape: tuple[int, ...], held: FlatRange, flat: Tensor) -> Iterator[Shard]:
    """The flat range as boxes, each of which views what the optimizer steps."""
    values = held.view_of(flat).detach()
    boxes = flat_range_to_boxes(shape, held.start, held.start + held.count)
    offset = 0
    for box in boxes:
        yield Shard(name, shape, box, values.narrow(0, offset, box.numel).view(box.sizes))
        offset += box.numel
    if not boxes:
        empty = Box((0,) * len(shape), (0,) * len(shape))
        yield Shard(name, shape, empty, values.new_empty(empty.sizes))


def _create_missing(
    prepared: Prepared,
    state: dict[str, Any],
    held: FlatRange,
    shape: tuple[int, ...],
    prefix: str,
    stored: Mapping[str, Any],
) -> None:
    """Create the state that a checkpoint has for this parameter and the optimizer has not made yet."""
    for name, info in stored.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or name.endswith(NUMBER) or key in state or prepared.optimizer is None:
            continue
        if info.shape and tuple(info.shape) != shape:
            reject_opaque(name, torch.empty(info.shape, device="meta"))
        group = prepared.optimizer.param_groups[held.group]
        device = held.flat.device if info.shape else home_of_scalar(group, held.flat, key)
        sizes = held.flat.shape if info.shape else ()
        state[key] = torch.zeros(sizes, dtype=info.dtype, device=device)


def _state_shards(
    state: Mapping[str, Any], held: FlatRange, shape: tuple[int, ...], prefix: str, replica: tuple[int, int]
) -> Iterator[Shard]:
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == held.flat.shape:
            yield from _cut(prefix + key, shape, held, value)
        elif value.dim() == 0:
            yield full_shard(prefix + key, value, replica)
        else:
            reject_opaque(prefix + key, value)
