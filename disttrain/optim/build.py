"""Optimizers and schedules from an import path and its arguments, over parameters that know their names.

Decides two things that users expect and torch leaves to them: vectors (biases, norms; global ndim below 2) get no
weight decay, and the fused implementation is taken where torch offers it for these parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from disttrain.config import check_arguments
from disttrain.errors import ConfigError, explain
from disttrain.optim.named import MakeOptimizer, MakeSchedule, NamedParameter

_FUSED_ON_DTENSORS = (torch.optim.Adam, torch.optim.AdamW)
"""Whose fused kernel DTensor knows (torch 2.13: `_fused_sgd_` and `_fused_adagrad_` have no sharding rule)."""


def optimizer_factory(
    make: Callable[..., Any], args: Mapping[str, Any], *, no_decay: Sequence[str] = (), decay_vectors: bool = False
) -> MakeOptimizer:
    """`make(groups, **args)` for named parameters; raises ConfigError where `args` do not fit `make`.

    `no_decay` are name patterns (fnmatch) of further parameters without weight decay.
    """
    check_arguments(make, ([],), args, what="optim.target")

    def build(named: Sequence[NamedParameter]) -> Optimizer:
        decay = args.get("weight_decay", _default(make, "weight_decay"))
        groups = decay_groups(named, decay, no_decay=no_decay, decay_vectors=decay_vectors)
        chosen = dict(args) | ({} if {"fused", "foreach"} & set(args) else implementation(make, named))
        optimizer = make(groups, **chosen)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                explain("optim.target makes a torch.optim.Optimizer.", f"a {type(optimizer).__qualname__}", "name one")
            )
        return optimizer

    return build


def decay_groups(
    named: Sequence[NamedParameter], decay: Any, *, no_decay: Sequence[str] = (), decay_vectors: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups: decayed, and not. One group where there is nothing to tell apart.

    DTensors and plain tensors never share a group: torch's foreach and fused kernels refuse the mixture.
    """
    spare: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for one in named:
        spared = bool(decay) and (
            (len(one.shape) < 2 and not decay_vectors) or any(fnmatchcase(one.name, pattern) for pattern in no_decay)
        )
        spare.setdefault((spared, isinstance(one.parameter, DTensor)), []).append(one.parameter)
    return [
        {"params": parameters, **({"weight_decay": 0.0} if spared else {})}
        for (spared, _), parameters in sorted(spare.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def implementation(make: Callable[..., Any], named: Sequence[NamedParameter]) -> dict[str, bool]:
    """`fused=True` where torch has kernels for optimizer, device, dtype and layout; else `foreach=True` likewise."""
    parameters = [one.parameter for one in named]
    supported = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters)
    if not (supported and parameters and getattr(inspect.getmodule(make), "__name__", "").startswith("torch.optim")):
        return {}
    cut = any(isinstance(parameter, DTensor) for parameter in parameters)
    if _default(make, "fused", missing=False) is None and (not cut or make in _FUSED_ON_DTENSORS):
        return {"fused": True}
    # On the CPU torch itself would loop over the parameters in Python.
    return {"foreach": True} if not cut and _default(make, "foreach", missing=False) is None else {}


def schedule_factory(make: Callable[..., Any], args: Mapping[str, Any], *, total_steps: int) -> MakeSchedule:
    """`make(optimizer, **args)`, and `total_steps` where it takes that. Raises ConfigError for args that do not fit."""
    given = dict(args)
    try:
        names = inspect.signature(make).parameters
    except (TypeError, ValueError):
        names = {}  # type: ignore[assignment]
    if "total_steps" in names and "total_steps" not in given:
        given["total_steps"] = total_steps
    check_arguments(make, (None,), given, what="schedule.target")
    return lambda optimizer: make(optimizer, **given)


def _default(make: Callable[..., Any], name: str, missing: Any = 0.0) -> Any:
    try:
        parameter = inspect.signature(make).parameters.get(name)
    except (TypeError, ValueError):
        return missing
    return missing if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
