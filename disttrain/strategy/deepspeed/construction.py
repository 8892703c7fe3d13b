"""Stage 3's parameters, cut one by one as they come to be, so that no device holds the whole model. Collective.

`init` is DeepSpeed's `zero.Init`, used for what it does to one parameter: rank 0's value to all, then each its part.
Imports no deepspeed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.model import fill
from disttrain.optim.named import NamedParameter
from disttrain.runtime.seeds import generators_for


def cut_whole(model: nn.Module, device: torch.device, init: Any) -> None:
    """Cut a model that stands whole on the host; buffers move to the device."""
    init._convert_to_zero_parameters(model.parameters())
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def fill_cut(model: nn.Module, device: torch.device, init: Any, *, seed: int) -> None:
    """Give a model of shapes alone (on the meta device) its first values: a rank holds one whole tensor at a time, and
    keeps its part of it. Raises ConfigError for values that nobody wrote."""
    places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    places.update(model.named_buffers(remove_duplicate=False))
    made: dict[int, Tensor] = {}

    def write(name: str, value: Tensor) -> None:
        place = places[name]
        found = value.to(device, place.dtype, copy=True)
        if isinstance(place, nn.Parameter):
            found = nn.Parameter(found, place.requires_grad)
            found.__dict__.update(vars(place))
            init._convert_to_zero_parameters([found])
        made[id(place)] = found

    fill(model, generators_for(seed), write)
    # Only now: until then the model goes on naming its shapes, from which it yields its values.
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, place in own.items():
                if place is not None:
                    own[name] = made[id(place)]  # type: ignore[assignment]


def largest_module(*modules: nn.Module | None) -> int:
    """Elements of the parameters that one module's forward gathers: its own, not its children's; the most of any."""
    owners = [owner for module in modules if module is not None for owner in module.modules()]
    return max(
        sum(getattr(own, "ds_numel", own.numel()) for own in owner.parameters(recurse=False)) for owner in owners
    )


def with_whole_shape(named: NamedParameter) -> NamedParameter:
    """The same parameter under its global shape; a cut one shows none. Local."""
    shape = getattr(named.parameter, "ds_shape", None)
    return named if shape is None else replace(named, shape=torch.Size(shape))
