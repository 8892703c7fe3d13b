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
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from disttrain.config import check_arguments
from disttrain.errors import ConfigError, explain
from disttrain.optim.named import PROBE, MakeOptimizer, MakeSchedule, NamedParameter

_FUSED_ON_DTENSORS = (torch.optim.Adam, torch.optim.AdamW)
"""Whose fused kernel DTensor knows (torch 2.13: `_fused_sgd_` and `_fused_adagrad_` have no sharding rule)."""

_OTHER_TOGETHER = torch.optim.ASGD
"""Whose foreach form gives other numbers (torch 2.13: by 1e-8 in float64 after twelve steps)."""

_OWN_LENGTH = {"total_steps", "epochs", "steps_per_epoch"}
"""Arguments by which a user says how long a schedule is (OneCycleLR would ignore the others beside `total_steps`)."""


def optimizer_factory(
    make: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    no_decay: Sequence[str] = (),
    decay_vectors: bool = False,
    key: str = "optim",
) -> MakeOptimizer:
    """`make(groups, **args)` for named parameters; raises ConfigError where `args` do not fit `make`.

    `no_decay` are name patterns (fnmatch) of further parameters without weight decay; `key` is the config's for it.
    """
    check_arguments(make, ([],), args, what=f"{key}.target")
    check_step(make, f"{key}.target")
    if make is torch.optim.SparseAdam:
        do = "use torch.optim.Adam, and nn.Embedding with sparse=False"
        raise ConfigError(explain(f"{key}.target steps on dense gradients.", "SparseAdam, which takes none", do))

    def build(named: Sequence[NamedParameter]) -> Optimizer:
        decay = args.get("weight_decay", _default(make, "weight_decay"))
        groups = decay_groups(named, decay, no_decay=no_decay, decay_vectors=decay_vectors, key=key)
        chosen = {} if {"fused", "foreach"} & set(args) else implementation(make, named)
        optimizer = _make(make, groups, args, f"{key}.args", **chosen)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                explain(f"{key}.target makes a torch.optim.Optimizer.", f"a {type(optimizer).__qualname__}", "name one")
            )
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
    """Parameter groups: decayed, and not. One group where there is nothing to tell apart.

    DTensors of one mesh, of another and plain tensors never share a group: torch's foreach and fused kernels refuse the
    mixture.
    Raises ConfigError for a pattern that no parameter's name matches.
    """
    for pattern in no_decay:
        if not any(one.name == PROBE or fnmatchcase(one.name, pattern) for one in named):
            raise ConfigError(
                explain(
                    f"{key}.no_decay names trainable parameters.",
                    f"{pattern!r}, which none of {len(named)} matches",
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
    """`fused=True` where torch has kernels for optimizer, device, dtype and layout; else `foreach=True` likewise."""
    parameters = [one.parameter for one in named]
    # Adagrad's fused kernel is for these two only, though torch lets the others through to their first step.
    devices = ("cpu", "cuda") if make is torch.optim.Adagrad else ("cpu", "cuda", "xpu", "mps")
    supported = all(p.is_floating_point() and p.device.type in devices for p in parameters)
    if not (supported and parameters and _is_torchs(make)):
        return {}
    cut = any(isinstance(parameter, DTensor) for parameter in parameters)
    if _default(make, "fused", missing=False) is None and (not cut or make in _FUSED_ON_DTENSORS):
        return {"fused": True}
    # On the CPU torch itself would loop over the parameters in Python.
    together = not cut and make is not _OTHER_TOGETHER and _default(make, "foreach", missing=False) is None
    return {"foreach": True} if together else {}


def schedule_factory(make: Callable[..., Any], args: Mapping[str, Any], *, total_steps: int) -> MakeSchedule:
    """`make(optimizer, **args)`, and `total_steps` where it takes that. Raises ConfigError for args that do not fit."""
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
            found = f"a {type(schedule).__qualname__}"
            raise ConfigError(explain("schedule.target makes a torch LRScheduler.", found, "name one"))
        if isinstance(schedule, OneCycleLR) and schedule.total_steps < total_steps:
            found = f"total_steps={schedule.total_steps}, of a run of {total_steps}: torch fails after its last"
            do = "leave the length out of schedule.args: it is the run's then"
            raise ConfigError(explain("OneCycleLR is to last as long as the run.", found, do))
        return schedule

    return build


def users_optimizer(make: Callable[[list[torch.nn.Parameter]], Optimizer]) -> MakeOptimizer:
    """A script's own factory, which takes the bare list of trainable parameters. Raises ConfigError when it is called
    for an optimizer that steps with arguments only."""

    def build(named: Sequence[NamedParameter]) -> Optimizer:
        optimizer = make([one.parameter for one in named])
        check_step(type(optimizer), "make_optimizer's optimizer")
        return optimizer

    return build


def users_schedule(make: Callable[[Optimizer], LRScheduler]) -> MakeSchedule:
    """A script's own factory. Raises ConfigError when it is called for a schedule that steps with arguments only."""

    def build(optimizer: Optimizer) -> LRScheduler:
        schedule = make(optimizer)
        check_step(type(schedule), "make_schedule's schedule")
        return schedule

    return build


def _make(make: Callable[..., Any], first: Any, args: Mapping[str, Any], what: str, **chosen: bool) -> Any:
    try:
        return make(first, **args, **chosen)
    except (TypeError, ValueError, IndexError) as error:
        if not _is_torchs(make):  # a user's own code speaks for itself
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in args.items())
        asked = f"{what} are values that {make.__name__} takes."
        raise ConfigError(
            explain(asked, f"{error} ({given})", "mend the value, or see torch's documentation")
        ) from error


def check_step(make: Callable[..., Any], what: str) -> None:
    """Refuse a class whose `step` needs an argument: nobody here has a closure or a metric for it."""
    try:
        signature = inspect.signature(make.step) if isinstance(make, type) and hasattr(make, "step") else None
    except (TypeError, ValueError):
        return
    needed = [name for name, one in signature.parameters.items() if _is_needed(one)][1:] if signature else []
    if needed:
        found = f"{make.__qualname__}.step, which needs {', '.join(needed)}"
        raise ConfigError(explain(f"{what} is stepped without arguments, once a step.", found, "choose another one"))


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
