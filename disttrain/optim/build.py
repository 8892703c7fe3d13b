"""Makes factories of optimizers and schedules from callables and their arguments.

Sets two defaults that torch leaves to the user. Vectors (biases, norms; global ndim below 2) get no weight decay, and
torch's fused implementation is used where it supports the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from disttrain.config import check_arguments
from disttrain.errors import ConfigError, explain
from disttrain.optim.named import PROBE, MakeOptimizer, MakeSchedule, NamedParameter

_FUSED_ON_DTENSORS = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose fused kernel supports DTensors (in torch 2.13, those of SGD and Adagrad have no sharding rule)."""

_OTHER_TOGETHER = torch.optim.ASGD
"""The optimizer whose foreach form differs (in torch 2.13, by 1e-8 in float64 after twelve steps)."""

_OWN_LENGTH = {"total_steps", "epochs", "steps_per_epoch"}
"""Arguments that set a schedule's length. With `total_steps`, OneCycleLR would ignore the others."""


def optimizer_factory(
    make: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    no_decay: Sequence[str] = (),
    decay_vectors: bool = False,
    key: str = "optim",
) -> MakeOptimizer:
    """A factory that calls `make(groups, **args)` for named parameters. Local.

    `no_decay` has patterns (fnmatch) of the names of further parameters without weight decay. `key` is the optimizer's
    key in the config. Raises ConfigError where `args` do not fit `make`.
    """
    check_arguments(make, ([],), args, what=f"{key}.target")
    check_step(make, f"{key}.target")
    if make is torch.optim.SparseAdam:
        fix = "use torch.optim.Adam, and nn.Embedding with sparse=False"
        raise ConfigError(explain(f"Cannot use {key}.target.", "SparseAdam does not accept dense gradients", fix))

    def build(named: Sequence[NamedParameter]) -> Optimizer:
        decay = args.get("weight_decay", _default(make, "weight_decay"))
        groups = decay_groups(named, decay, no_decay=no_decay, decay_vectors=decay_vectors, key=key)
        chosen = {} if {"fused", "foreach"} & set(args) else implementation(make, named)
        optimizer = _make(make, groups, args, f"{key}.args", **chosen)
        if not isinstance(optimizer, Optimizer):
            problem = f"it returns a {type(optimizer).__qualname__}, not a torch.optim.Optimizer"
            raise ConfigError(explain(f"Cannot use {key}.target.", problem, "name an optimizer class or factory"))
        return optimizer

    return build


def decay_groups(
    named: Sequence[NamedParameter],
    decay: Any,
    *,
    no_decay: Sequence[str] = (),
    decay_vectors: bool = False,
    key: str = "optim",
) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay, or one group if all parameters are alike. Local.

    DTensors of different meshes, and plain tensors, are in separate groups, because torch's foreach and fused kernels
    reject the mixture. Raises ConfigError for a pattern that matches no parameter.
    """
    for pattern in no_decay:
        if not any(one.name == PROBE or fnmatchcase(one.name, pattern) for one in named):
            raise ConfigError(
                explain(
                    f"Cannot use {key}.no_decay.",
                    f"{pattern!r} matches none of {len(named)} trainable parameters",
                    f"name some of them: {', '.join(one.name for one in named[:20])}{', ...' if named[20:] else ''}",
                )
            )
    spare: dict[tuple[bool, Any], list[torch.nn.Parameter]] = {}
    for one in named:
        spared = bool(decay) and (
            (len(one.shape) < 2 and not decay_vectors) or any(fnmatchcase(one.name, pattern) for pattern in no_decay)
        )
        mesh = one.parameter.device_mesh if isinstance(one.parameter, DTensor) else None
        spare.setdefault((spared, mesh), []).append(one.parameter)
    return [
        {"params": parameters, **({"weight_decay": 0.0} if spared else {})}
        for (spared, _), parameters in sorted(spare.items(), key=lambda item: (item[0][0], item[0][1] is None))
    ]


def implementation(make: Callable[..., Any], named: Sequence[NamedParameter]) -> dict[str, bool]:
    """`fused=True` if torch's fused kernel supports optimizer and parameters, else `foreach=True` likewise. Local."""
    parameters = [one.parameter for one in named]
    # Adagrad's fused kernel supports only these two devices. Torch accepts others, and fails at their first step.
    devices = ("cpu", "cuda") if make is torch.optim.Adagrad else ("cpu", "cuda", "xpu", "mps")
    supported = all(p.is_floating_point() and p.device.type in devices for p in parameters)
    if not (supported and parameters and _is_torchs(make)):
        return {}
    cut = any(isinstance(parameter, DTensor) for parameter in parameters)
    if _default(make, "fused", missing=False) is None and (not cut or make in _FUSED_ON_DTENSORS):
        return {"fused": True}
    # By default torch would loop over the parameters in Python on the CPU.
    together = not cut and make is not _OTHER_TOGETHER and _default(make, "foreach", missing=False) is None
    return {"foreach": True} if together else {}


def schedule_factory(make: Callable[..., Any], args: Mapping[str, Any], *, total_steps: int) -> MakeSchedule:
    """A factory that calls `make(optimizer, **args)`, with `total_steps` if `make` has that parameter. Local.

    Raises ConfigError for arguments that do not fit.
    """
    given = dict(args)
    try:
        names = inspect.signature(make).parameters
    except (TypeError, ValueError):
        names = {}  # type: ignore[assignment]
    if "total_steps" in names and not _OWN_LENGTH & set(given):
        given["total_steps"] = total_steps
    check_arguments(make, (None,), given, what="schedule.target")
    check_step(make, "schedule.target")

    def build(optimizer: Optimizer) -> LRScheduler:
        schedule = _make(make, optimizer, given, "schedule.args")
        if not isinstance(schedule, LRScheduler):
            problem = f"it returns a {type(schedule).__qualname__}, not a torch LRScheduler"
            raise ConfigError(explain("Cannot use schedule.target.", problem, "name a schedule class or factory"))
        if isinstance(schedule, OneCycleLR) and schedule.total_steps < total_steps:
            problem = f"total_steps={schedule.total_steps} in a run of {total_steps}: torch fails after the last step"
            fix = "leave the length out of schedule.args: it defaults to the run's"
            raise ConfigError(explain("Cannot use OneCycleLR, which is shorter than the run.", problem, fix))
        return schedule

    return build


def users_optimizer(make: Callable[[list[torch.nn.Parameter]], Optimizer]) -> MakeOptimizer:
    """Adapt a user's factory, which takes the list of trainable parameters. Local.

    The adapted factory raises ConfigError for an optimizer whose step needs arguments.
    """

    def build(named: Sequence[NamedParameter]) -> Optimizer:
        optimizer = make([one.parameter for one in named])
        check_step(type(optimizer), "make_optimizer's optimizer")
        return optimizer

    return build


def users_schedule(make: Callable[[Optimizer], LRScheduler]) -> MakeSchedule:
    """Adapt a user's factory of a schedule. Local.

    The adapted factory raises ConfigError for a schedule whose step needs arguments.
    """

    def build(optimizer: Optimizer) -> LRScheduler:
        schedule = make(optimizer)
        check_step(type(schedule), "make_schedule's schedule")
        return schedule

    return build


def _make(make: Callable[..., Any], first: Any, args: Mapping[str, Any], what: str, **chosen: bool) -> Any:
    try:
        return make(first, **args, **chosen)
    except (TypeError, ValueError, IndexError) as error:
        if not _is_torchs(make):  # a user's code raises its own error
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in args.items())
        failed = f"Cannot pass {what} to {make.__name__}."
        raise ConfigError(
            explain(failed, f"{error} ({given})", "correct the value, or see torch's documentation")
        ) from error


def check_step(make: Callable[..., Any], what: str) -> None:
    """Raise ConfigError for a class whose `step` needs an argument, such as a closure or a metric. Local."""
    try:
        signature = inspect.signature(make.step) if isinstance(make, type) and hasattr(make, "step") else None
    except (TypeError, ValueError):
        return
    needed = [name for name, one in signature.parameters.items() if _is_needed(one)][1:] if signature else []
    if needed:
        problem = f"{make.__qualname__}.step needs {', '.join(needed)}"
        failed = f"Cannot use {what}, which is stepped without arguments."
        raise ConfigError(explain(failed, problem, "choose a class whose step needs no argument"))


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not variadic


def _is_torchs(make: Callable[..., Any]) -> bool:
    return getattr(inspect.getmodule(make), "__name__", "").startswith("torch.optim")


def _default(make: Callable[..., Any], name: str, missing: Any = 0.0) -> Any:
    try:
        parameter = inspect.signature(make).parameters.get(name)
    except (TypeError, ValueError):
        return missing
    return missing if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
