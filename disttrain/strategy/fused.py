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

# What torch.optim.adam calls in the end (torch 2.11 to 2.13).
_KERNELS: dict[type[Optimizer], Callable[..., Any]] = {Adam: torch._fused_adam_, AdamW: torch._fused_adamw_}
_STATE = ("exp_avg", "exp_avg_sq", "step")
_AS_MADE = {"fused": True, "amsgrad": False, "capturable": False, "differentiable": False}


class _Group(NamedTuple):
    """One of the optimizer's groups: its parameters, how to pick their gradients from all, their state."""

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    pick: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    rows: list[dict[str, Tensor]]


class FusedAdam:
    """Steps of one optimizer, whose parameters are among `parameters`. Local; within `torch.no_grad`."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer, self._parameters = optimizer, parameters
        self._class_step = type(optimizer).step
        self._own_step: Any = None
        self._rows: list[dict[str, Tensor]] = []
        self._groups: list[_Group] = []
        self._dtype: torch.dtype | None = None

    def ready(self, gradients: Sequence[Tensor], dtype: torch.dtype | None) -> bool:
        """Whether `step` would do what the optimizer's own does. `gradients` are all parameters', as these hold them,
        and `dtype` is theirs, None where they have several."""
        optimizer = self.optimizer
        if type(optimizer) not in _KERNELS or self._is_watched():
            return False
        if not self._knows():
            self._groups = self._look()
        return bool(self._groups) and dtype is self._dtype and all(map(_cut_alike, gradients, self._parameters))

    def step(self, local: Sequence[Tensor], divisor: Tensor | None) -> None:
        """Once `ready`: the step on gradients' `local` tensors, each divided by `divisor` where there is one."""
        for group, parameters, pick, rows in self._groups:
            averages, squares, steps = ([_local(row[name]) for row in rows] for name in _STATE)
            # A number would be made a tensor for every one of them anew.
            torch._foreach_add_(steps, torch.ones((), dtype=torch.float32, device=steps[0].device))
            beta1, beta2 = group["betas"]
            _KERNELS[type(self.optimizer)](
                [_local(parameter) for parameter in parameters],
                pick(local),
                averages,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
                grad_scale=divisor,
                found_inf=None,
            )

    def _is_watched(self) -> bool:
        optimizer = self.optimizer
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
            or type(optimizer).step is not self._class_step
        )

    def _knows(self) -> bool:
        """Whether `step`, the groups and their state are the very objects that were looked at."""
        optimizer = self.optimizer
        return (
            optimizer.__dict__.get("step") is self._own_step
            and len(optimizer.state) == len(self._rows)
            and all(map(is_, optimizer.state.values(), self._rows))
            and len(optimizer.param_groups) == len(self._groups)
            and all(
                known.group is group and type(group["lr"]) is float
                for known, group in zip(self._groups, optimizer.param_groups, strict=True)
            )
        )

    def _look(self) -> list[_Group]:
        """The groups as they are now; none where the kernel, which trusts its caller, is not for them."""
        optimizer = self.optimizer
        self._own_step, self._rows = optimizer.__dict__.get("step"), list(optimizer.state.values())
        if self._own_step is not None and not self._is_schedules(self._own_step):
            return []
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        found = []
        for group in optimizer.param_groups:
            parameters = group["params"]
            rows = [optimizer.state[one] for one in parameters if one in optimizer.state]
            if not (
                all(group.get(key) is value for key, value in _AS_MADE.items())
                and type(group["lr"]) is float
                and all(id(one) in places for one in parameters)
                and len(rows) == len(parameters) > 0
                and all(row.keys() == set(_STATE) for row in rows)
            ):
                return []
            found.append(_Group(group, parameters, _picker([places[id(one)] for one in parameters]), rows))
        held: list[Tensor] = [one for known in found for one in known.parameters]
        held += [row[name] for known in found for row in known.rows for name in _STATE[:2]]
        kinds = set(map(attrgetter("device", "dtype"), held))
        self._dtype = next(iter(kinds))[1] if len(kinds) == 1 else None
        return found if self._dtype is not None else []

    def _is_schedules(self, step: Any) -> bool:
        """Whether it is the class's own, in the wrapper by which a schedule notes that it was called (LRScheduler)."""
        return hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is self._class_step


def _picker(places: Sequence[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: (tensors[places[0]],)


def _cut_alike(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether their local tensors are the same part of the whole."""
    return type(gradient) is Tensor or getattr(gradient, "placements", None) == getattr(parameter, "placements", None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
