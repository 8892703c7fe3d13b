"""Gathers parameters around a model's public methods. FSDP2 gathers them around `forward` only.

An objective may call `model.encode(x)`, which needs full parameters. The public methods of the user's model classes
therefore gather parameters too, when they are called with tensors outside another call of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method


def gather_around_methods(model: nn.Module) -> None:
    """Let the methods of a sharded model gather as its `forward` does. Local. Later calls of them are collective."""
    depth = [0]

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    model.register_forward_pre_hook(enter, prepend=True)
    model.register_forward_hook(leave, always_call=True)
    for name in _own_methods(type(model)):
        plain = getattr(model, name)
        register_fsdp_forward_method(model, name)
        vars(model)[name] = _dispatching(plain, getattr(model, name), depth)


def _dispatching(plain: Callable[..., Any], gathering: Callable[..., Any], depth: list[int]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if depth[0] or not any(_tensors_in((args, kwargs))):
            return plain(*args, **kwargs)
        depth[0] += 1
        try:
            return gathering(*args, **kwargs)
        finally:
            depth[0] -= 1

    return call


def _own_methods(kind: type) -> Iterator[str]:
    """Yield the names of public instance methods that `nn.Module` and torch's modules do not have."""
    for name in dir(kind):
        if name.startswith("_") or hasattr(nn.Module, name):
            continue
        owner = next(one for one in kind.__mro__ if name in vars(one))
        if inspect.isfunction(vars(owner)[name]) and not owner.__module__.startswith("torch."):
            yield name


def _tensors_in(value: Any) -> Iterator[bool]:
    if isinstance(value, Tensor):
        yield True
    elif isinstance(value, Mapping):
        yield from _tensors_in([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
