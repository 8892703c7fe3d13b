"""Looks up private names of torch, and decides once per process whether one is used or its public alternative.

`private` and `reader` are the only two functions that look up a private name. Every other module of this package calls
them through this one, so that a test can replace them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_log = logging.getLogger("disttrain.torch_internals")


def private(owner: Any, name: str, *default: Any) -> Any:
    """Return the attribute `name` of `owner`, or the `default` where it has none.

    `owner` is an object, or the dotted name of a module, which is imported.
    """
    return getattr(import_module(owner) if isinstance(owner, str) else owner, name, *default)


def reader(*names: str) -> Callable[[Any], Any]:
    """Return a function that reads attributes of an object at the speed of C: one value, or a tuple of several."""
    return attrgetter(*names)


def choose(what: str, public: T, probed: Callable[[], T]) -> T:
    """Return the result of `probed`, or `public` where that raises.

    `probed` looks up private names and tries them on a small example. A name that is missing is logged.
    """
    try:
        return probed()
    except Exception as error:  # noqa: BLE001 - a renamed or changed private name may raise anything
        _log.warning("torch %s has no usable %s (%r): disttrain works without it", torch.__version__, what, error)
        return public


def check(condition: object, what: str) -> None:
    """Raise LookupError where a private name exists and behaves differently from what its user expects."""
    if not condition:
        raise LookupError(f"{what} behaves differently")


def small_tensor(*values: float) -> Tensor:
    """Return a float32 vector on the CPU, whatever torch's default device and dtype are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
