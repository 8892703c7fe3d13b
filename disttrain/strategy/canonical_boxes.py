"""Describes the tensors of modules and torch optimizers as canonical boxes, which any strategy can load.

A replicated tensor is one full box. A DTensor is its local box. Names are `KIND/OWNER/NAME`:
`model/OWNER/blocks.0.weight`, `objective/OWNER/...`, and `optim/OWNER/PARAMETER:KEY` for optimizer state.

Optimizer state with its parameter's shape has the parameter's box. Scalars are 0-d tensors. State of any other shape is
opaque: it is saved where the parameter is replicated, and rejected where the parameter is sharded. A Python number is
the 0-d tensor `KEY:number` in the file and a number again in the optimizer. Other state is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from disttrain.checkpoint import Box, Shard, full_shard
from disttrain.errors import CheckpointError, explain
from disttrain.strategy.contract import LoadingNumber, Prepared
from disttrain.torch_internals.meshes import copies_outside, local_box

Replica = tuple[int, int]

NUMBER = ":number"
"""The suffix of a Python number's name. The dtype alone does not distinguish a number from a 0-d tensor."""

_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def replicated_shards(prepared: Prepared, stored: Mapping[str, Any] | None, *, replica: Replica) -> list[Shard]:
    """Return a full box of each tensor, as every rank holds it. `replica` is (rank, world size). Local."""
    return [full_shard(name, tensor.detach(), replica) for name, tensor in _tensors(prepared, stored)]


def sharded_shards(prepared: Prepared, stored: Mapping[str, Any] | None, *, rank: int, size: int) -> list[Shard]:
    """Return the local boxes of DTensors and full boxes of all other tensors. Local.

    Raises CheckpointError for opaque state of a sharded parameter.
    """
    shards = []
    for name, tensor in _tensors(prepared, stored):
        if not isinstance(tensor, DTensor):
            shards.append(full_shard(name, tensor.detach(), (rank, size)))
            continue
        shards.append(local_shard(name, tensor))
    return shards


def local_shard(name: str, tensor: DTensor) -> Shard:
    """Return this rank's box of a DTensor, with its index among the ranks that hold the same box. Local.

    Raises CheckpointError for a DTensor with a partial placement.
    """
    mesh, index, count = tensor.device_mesh, 0, 1
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate() or (), tensor.placements, strict=True):
        if placement.is_partial():
            problem = "it is a DTensor with a partial placement, whose sums are not added up yet"
            raise CheckpointError(explain(f"Cannot save {name}.", problem, "redistribute it first"))
        if placement.is_replicate():
            index, count = index * size + place, count * size
    # A DTensor on one axis of a larger mesh has copies along the other axes.
    slice_index, slices = copies_outside(mesh)
    index, count = index * slices + slice_index, count * slices
    sizes, offsets = local_box(tensor)
    box = Box(tuple(offsets), tuple(sizes))
    return Shard(name, tuple(tensor.shape), box, tensor.to_local().detach(), (index, count))


def copy_part(place: Tensor, value: Tensor) -> None:
    """Copy a full value into a tensor, or its local part into a DTensor. Local."""
    with torch.no_grad():
        if not isinstance(place, DTensor):
            place.copy_(value)
            return
        sizes, offsets = local_box(place)
        part = value[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
        place.to_local().copy_(part)


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full CPU value of each entry of the state dict. Collective, because DTensors are gathered."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            full = _gathered(tensor) if isinstance(tensor, DTensor) else tensor
            yield name, full.detach().to("cpu", copy=True)


def _gathered(tensor: DTensor) -> Tensor:
    """Gather one mesh axis after the other. For all axes at once torch warns where two of them shard one dim."""
    placements = list(tensor.placements)
    for axis in range(len(placements)):
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def _tensors(prepared: Prepared, stored: Mapping[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
    for kind, module in (("model", prepared.model), ("objective", prepared.objective)):
        if module is not None:
            yield from ((f"{kind}/{prepared.name}/{name}", tensor) for name, tensor in _unique(module))
    if prepared.optimizer is None:
        return
    for named in prepared.named:
        prefix = f"optim/{prepared.name}/{named.name}:"
        state = prepared.optimizer.state[named.parameter]
        if stored is not None:
            _create_state(prepared.optimizer, named.parameter, prefix, stored)
        yield from number_tensors(prepared, state, prefix, stored)
        for key, value in state.items():
            if isinstance(value, Tensor):
                if isinstance(named.parameter, DTensor) and not isinstance(value, DTensor) and value.dim() > 0:
                    reject_opaque(prefix + key, value)
                yield prefix + key, value


def _unique(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter once, under its first name, and the persistent buffers."""
    yield from module.named_parameters()
    persistent = {name for name, _ in module.named_buffers()} & set(module.state_dict().keys())
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _create_state(optimizer: Optimizer, parameter: nn.Parameter, prefix: str, stored: Mapping[str, Any]) -> None:
    """Create tensors for stored state, with the parameter's layout where the shapes are equal."""
    state = optimizer.state[parameter]
    for name, info in stored.items():
        if not name.startswith(prefix) or name.endswith(NUMBER) or name.removeprefix(prefix) in state:
            continue
        key = name.removeprefix(prefix)
        if tuple(info.shape) == tuple(parameter.shape) and parameter.dim() > 0:
            state[key] = torch.zeros_like(parameter, dtype=info.dtype, requires_grad=False)
        elif not info.shape:
            groups = (one for one in optimizer.param_groups if any(own is parameter for own in one["params"]))
            state[key] = torch.zeros((), dtype=info.dtype, device=home_of_scalar(next(groups, {}), parameter, key))
        elif isinstance(parameter, DTensor):
            reject_opaque(name, torch.empty(info.shape, device="meta"))
        else:
            state[key] = torch.zeros(info.shape, dtype=info.dtype, device=parameter.device)


def home_of_scalar(group: Mapping[str, Any], parameter: Tensor, key: str) -> torch.device:
    """Return the device on which an optimizer keeps a 0-d tensor, by the rule of torch's `load_state_dict`.

    `step` is on the host, unless the group is fused or capturable (torch 2.13,
    Optimizer._process_value_according_to_param_policy).
    """
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if on_host else parameter.device


def number_tensors(
    prepared: Prepared, state: dict[str, Any], prefix: str, stored: Mapping[str, Any] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and 0-d tensor of each Python number in an optimizer's state of one parameter.

    With `stored` the tensor receives the stored number, and `AbstractStrategy.loaded` puts that into the state. Raises
    CheckpointError for a value that is neither tensor nor number.
    """
    if stored is not None:
        for name in [name for name in stored if name.startswith(prefix) and name.endswith(NUMBER)]:
            place = torch.zeros((), dtype=stored[name].dtype)
            prepared.loading.append(LoadingNumber(state, name.removeprefix(prefix).removesuffix(NUMBER), place))
            yield name, place
        return
    for key, value in state.items():
        if isinstance(value, Tensor):
            continue
        if type(value) not in _DTYPES:
            raise CheckpointError(
                explain(
                    f"Cannot save optimizer state {prefix + key!r}.",
                    f"it is a {type(value).__qualname__}, not a tensor or a Python number",
                    "keep only tensors and Python numbers in the optimizer's state",
                )
            )
        yield prefix + key + NUMBER, torch.tensor(value, dtype=_DTYPES[type(value)])


def reject_opaque(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for optimizer state of another shape than that of its sharded parameter."""
    raise CheckpointError(
        explain(
            f"Cannot save or load optimizer state {name!r}, whose parameter is sharded.",
            f"its shape {tuple(tensor.shape)} is not the parameter's",
            "use strategy none or ddp with this optimizer, or an optimizer whose state is elementwise",
        )
    )
