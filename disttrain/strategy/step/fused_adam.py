"""Adam and AdamW by torch's fused kernel itself, without what `Optimizer.step` does in Python around it.

Owns the question whether that is the same. It is for torch's own two classes with fused=True and state of every
parameter, while nothing watches the step: no hook, no profiler, no other `step` put in its place. All else, a first
step too, is the optimizer's own to take. State stays where torch keeps it and is looked up anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_STATE = ("exp_avg", "exp_avg_sq", "step")
_PLAIN = {"fused": True, "amsgrad": False, "capturable": False, "differentiable": False}
"""A group's settings with which torch.optim.adam (torch 2.13) ends in the kernel, on state of these three."""
_HOOKED = Optimizer.profile_hook_step(lambda *_: None).__code__
_STEP = Adam.step.__wrapped__ if Adam.step.__code__ is _HOOKED else Adam.step  # type: ignore[attr-defined]
"""Torch's `Adam.step`, and the code of the wrapper that the first object of a class puts around it."""


class _Group(NamedTuple):
    """One of the optimizer's groups: its parameters, how to pick their gradients from all, their state."""

    settings: dict[str, Any]
    parameters: list[nn.Parameter]
    size: int
    pick: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    rows: list[dict[str, Tensor]]


class FusedAdam:
    """Steps of one optimizer, whose parameters are among `parameters`. Local; within `torch.no_grad`."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer, self._parameters = optimizer, parameters
        self._own_step: Any = None
        self._rows: list[dict[str, Tensor]] = []
        self._groups: list[_Group] = []
        self._dtype: torch.dtype | None = None

    def ready(self, gradients: Sequence[Tensor], dtype: torch.dtype | None) -> bool:
        """Whether `step` would do what the optimizer's own does. `gradients` are all parameters', as these hold them,
        and `dtype` is theirs, None where they have several."""
        if self._is_watched() or not all(map(_is_plain, self.optimizer.param_groups)):
            return False
        if not self._is_as_seen():
            self._groups = self._see()
        return bool(self._groups) and dtype is self._dtype and all(map(_cut_alike, gradients, self._parameters))

    def step(self, local: Sequence[Tensor], divisor: Tensor | None) -> None:
        """Once `ready`: the step on gradients' `local` tensors, each divided by `divisor` where there is one."""
        for settings, parameters, _, pick, rows in self._groups:
            averages, squares, steps = ([local_part(row[name]) for row in rows] for name in _STATE)
            # On a CPU a number is made a tensor for every one of them anew; on a GPU a tensor is waited for.
            torch._foreach_add_(steps, torch.ones(()) if steps[0].is_cpu else 1)
            beta1, beta2 = settings["betas"]
            decoupled = settings.get("decoupled_weight_decay", type(self.optimizer) is AdamW)
            (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
                [local_part(parameter) for parameter in parameters],
                pick(local),
                averages,
                squares,
                [],
                steps,
                lr=settings["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                amsgrad=False,
                maximize=settings["maximize"],
                grad_scale=divisor,
                found_inf=None,
            )
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what a schedule asks for

    def _is_watched(self) -> bool:
        optimizer, step = self.optimizer, type(self.optimizer).step
        return bool(
            type(optimizer) not in (Adam, AdamW)
            or getattr(step, "__code__", None) is not _HOOKED
            or getattr(step, "__wrapped__", None) is not _STEP
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )

    def _is_as_seen(self) -> bool:
        """Whether `step`, groups, parameters and rows of state are the very objects that were seen."""
        optimizer = self.optimizer
        return (
            optimizer.__dict__.get("step") is self._own_step
            and len(optimizer.state) == len(self._rows)
            and all(map(is_, optimizer.state.values(), self._rows))
            and len(optimizer.param_groups) == len(self._groups)
            and all(
                seen.settings is group and seen.parameters is group["params"] and seen.size == len(group["params"])
                for seen, group in zip(self._groups, optimizer.param_groups, strict=True)
            )
        )

    def _see(self) -> list[_Group]:
        """The groups as they are now; none where the kernel, which trusts its caller, is not for them."""
        optimizer = self.optimizer
        self._own_step, self._rows = optimizer.__dict__.get("step"), list(optimizer.state.values())
        if self._own_step is not None and not _is_schedules(self._own_step):
            return []
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        found = []
        for group in optimizer.param_groups:
            parameters = group["params"]
            rows = [optimizer.state[one] for one in parameters if one in optimizer.state]
            if not (
                len(rows) == len(parameters) > 0
                and all(id(one) in places for one in parameters)
                and all(map(_is_state_of, rows, parameters))
            ):
                return []
            pick = _picker([places[id(one)] for one in parameters])
            found.append(_Group(group, parameters, len(parameters), pick, rows))
        held: list[Tensor] = [one for seen in found for one in seen.parameters]
        held += [row[name] for seen in found for row in seen.rows for name in _STATE[:2]]
        kinds = set(map(attrgetter("device", "dtype"), held))
        self._dtype = next(iter(kinds))[1] if len(kinds) == 1 else None
        return found if self._dtype is not None else []


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: itself where no mesh cuts it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_plain(group: dict[str, Any]) -> bool:
    return type(group["lr"]) is float and all(group.get(key) is value for key, value in _PLAIN.items())


def _is_state_of(row: dict[str, Tensor], parameter: Tensor) -> bool:
    return (
        row.keys() == set(_STATE)
        and all(row[name].shape == parameter.shape for name in _STATE[:2])
        and row["step"].device == parameter.device
    )


def _is_schedules(step: Any) -> bool:
    """Whether it is the class's own, in the wrapper by which a schedule notes that it was called (LRScheduler)."""
    inner = getattr(step, "__wrapped__", None)
    return hasattr(step, "_wrapped_by_lr_sched") and getattr(inner, "__wrapped__", None) is _STEP


def _picker(places: Sequence[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: (tensors[places[0]],)


def _cut_alike(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether their local tensors are the same part of the whole."""
    return type(gradient) is Tensor or getattr(gradient, "placements", None) == getattr(parameter, "placements", None)
