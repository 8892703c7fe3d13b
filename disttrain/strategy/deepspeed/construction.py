"""Partitions the parameters of a stage 3 model one by one, so that no device holds the complete model. Collective.

Imports no deepspeed: `partition` is a function that partitions parameters in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from disttrain.model import fill
from disttrain.optim.named import NamedParameter
from disttrain.runtime.seeds import generators_for
from disttrain.strategy.deepspeed.deepspeed_internals import global_shape

Partition = Callable[[Iterable[nn.Parameter]], None]


def partition_built(model: nn.Module, device: torch.device, partition: Partition) -> None:
    """Partition a complete model that is on the host, and move its buffers to the device."""
    partition(model.parameters())
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, buffer.to(device))


def fill_partitioned(model: nn.Module, device: torch.device, partition: Partition, *, seed: int) -> None:
    """Give a model on the meta device its initial values.

    A rank holds one complete tensor at a time, and keeps its part of it. Raises ConfigError for a parameter or buffer
    that no method of the model initializes.
    """
    shapes: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    shapes.update(model.named_buffers(remove_duplicate=False))
    filled: dict[int, Tensor] = {}

    def write(name: str, value: Tensor) -> None:
        shape = shapes[name]
        tensor = value.to(device, shape.dtype, copy=True)
        if isinstance(shape, nn.Parameter):
            tensor = nn.Parameter(tensor, shape.requires_grad)
            tensor.__dict__.update(vars(shape))
            partition([tensor])
        filled[id(shape)] = tensor

    fill(model, generators_for(seed), write)
    # Only now, because `fill` reads the model's shapes until it has yielded every value.
    for module in model.modules():
        tensors: list[tuple[str, Tensor]] = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, shape in tensors:
            setattr(module, name, filled[id(shape)])


def largest_module(*modules: nn.Module | None) -> int:
    """The largest number of elements that one module's forward gathers: its parameters without its children's. Pure."""
    owners = [owner for module in modules if module is not None for owner in module.modules()]
    return max(sum(global_shape(one).numel() for one in owner.parameters(recurse=False)) for owner in owners)


def with_global_shape(named: NamedParameter) -> NamedParameter:
    """The same parameter with its global shape, which a partitioned parameter does not show. Local."""
    return replace(named, shape=global_shape(named.parameter))
