"""Steps Adam and AdamW by torch's fused kernel, without the Python of `Optimizer.step`.

This module also decides whether that gives the same result. It does for torch's two classes with fused=True and state
for every parameter, as long as no hook, profiler or replaced `step` observes the step. The optimizer takes all other
steps itself, and the first one. State stays where torch keeps it, and is looked up at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from disttrain.torch_internals.optimizers import fused_adam

_STATE = ("exp_avg", "exp_avg_sq", "step")
_PLAIN = {"fused": True, "amsgrad": False, "capturable": False, "differentiable": False}
"""Settings of a group with which torch.optim.adam (torch 2.13) calls the kernel, on the state of `_STATE`."""


class _Group(NamedTuple):
    """A group of the optimizer: parameters, a function that picks their gradients from all, and their state."""

    settings: dict[str, Any]
    parameters: list[nn.Parameter]
    size: int
    pick: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    rows: list[dict[str, Tensor]]


class FusedAdam:
    """The fused steps of one optimizer, whose parameters are among `parameters`. Local; within `torch.no_grad`."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer, self._parameters = optimizer, parameters
        self._own_step: Any = None
        self._rows: list[dict[str, Tensor]] = []
        self._groups: list[_Group] = []
        self._dtype: torch.dtype | None = None
        self._kernels = fused_adam()

    def ready(self, gradients: Sequence[Tensor], dtype: torch.dtype | None) -> bool:
        """Whether `step` would give the result of the optimizer's step.

        `gradients` are those of all parameters, as the parameters hold them. `dtype` is None where they have several.
        """
        if self._kernels is None or self._kernels.is_watched(self.optimizer):
            return False
        if not all(map(_is_plain, self.optimizer.param_groups)):
            return False
        if not self._is_as_seen():
            self._groups = self._see()
        return bool(self._groups) and dtype is self._dtype and all(map(_cut_alike, gradients, self._parameters))

    def step(self, local: Sequence[Tensor], divisor: Tensor | None) -> None:
        """Step on the gradients' `local` tensors, divided by `divisor` where there is one. Requires `ready`."""
        assert self._kernels is not None, "not ready"
        for settings, parameters, _, pick, rows in self._groups:
            state = ([local_part(row[name]) for row in rows] for name in _STATE)
            decoupled = settings.get("decoupled_weight_decay", type(self.optimizer) is AdamW)
            mine = [local_part(parameter) for parameter in parameters]
            self._kernels.step(settings, [mine, pick(local), *state], divisor, decoupled)
        self._kernels.note_call(self.optimizer)

    def _is_as_seen(self) -> bool:
        """Whether `step`, groups, parameters and state are the same objects as in the last `_see`."""
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
        """Return the groups, or none where the kernel does not support them. The kernel checks nothing itself."""
        optimizer = self.optimizer
        assert self._kernels is not None, "asked before"
        self._own_step, self._rows = optimizer.__dict__.get("step"), list(optimizer.state.values())
        if self._own_step is not None and not self._kernels.is_of_schedule(self._own_step):
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
    """Return this rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_plain(group: dict[str, Any]) -> bool:
    return type(group["lr"]) is float and all(group.get(key) is value for key, value in _PLAIN.items())


def _is_state_of(row: dict[str, Tensor], parameter: Tensor) -> bool:
    return (
        row.keys() == set(_STATE)
        and all(row[name].shape == parameter.shape for name in _STATE[:2])
        and row["step"].device == parameter.device
    )


def _picker(places: Sequence[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: (tensors[places[0]],)


def _cut_alike(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether their local tensors are the same part of the full tensors."""
    return type(gradient) is Tensor or getattr(gradient, "placements", None) == getattr(parameter, "placements", None)
