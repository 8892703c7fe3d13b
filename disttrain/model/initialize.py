"""Initializes models, either by the constructor under a seed or tensor by tensor from `init_weights`.

A model may have a method `init_weights(generator_for)` that yields (name, full value) for every parameter and buffer,
from shapes alone. Only a model with this method may be built on the meta device. `reset_parameters` is not sufficient:
it turns nanoGPT's 0.02 into 1.0 and does not write computed buffers. A tensor without a value is an error.
Strategies build and fill models with this module, and the built-in models call `fill_self`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError, explain
from disttrain.runtime.seeds import GeneratorFor, generators_for, seed_everything

Write = Callable[[str, Tensor], None]


def build_model(make: Callable[[], Any], *, seed: int, meta: bool) -> nn.Module:
    """Return the model that `make` builds under `seed`, on the CPU or, with `meta`, as shapes only. Local.

    The seeds stay set, so that code after the constructor draws the same numbers as in a plain script. Raises
    ConfigError if the result is not a module.
    """
    seed_everything(seed)
    with torch.device("meta") if meta else nullcontext():
        model = make()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            explain(
                "model.target must return a torch.nn.Module.",
                f"it returned a {type(model).__qualname__}",
                "set it to the module's class, or to a function that returns a module",
            )
        )
    return model


def says_how(maker: Any) -> bool:
    """Return whether `maker` has `init_weights(generator_for)`. Local, and builds nothing.

    `maker` is a module, its class, or a partial or `functools.wraps` of its class. An inherited `init_weights` does not
    count if the subclass has its own constructor, because that may add or change values. Any other factory returns
    false: it would have to be called, which might download a model.
    """
    while not isinstance(maker, nn.Module | type):
        if isinstance(maker, functools.partial):
            maker = maker.func
        elif hasattr(maker, "__wrapped__"):
            maker = maker.__wrapped__
        else:
            return False
    method = getattr(maker, "init_weights", None)
    # Many models have a different method of this name, `init_weights(self)`, which fills the model in place.
    if not callable(method) or "generator_for" not in inspect.signature(method).parameters:
        return False
    classes = (maker if isinstance(maker, type) else type(maker)).__mro__
    nearest = next(one for one in classes if {"__init__", "init_weights"} & vars(one).keys())
    return "init_weights" in vars(nearest)


def fill(module: nn.Module, generator_for: GeneratorFor, write: Write) -> None:
    """Pass every initial value of `module` to `write(name, value)`, one full CPU tensor at a time. Local.

    A tied tensor, which has several names, is written under any of them. Raises ConfigError for a name that does not
    exist, a shape that differs, and a parameter or buffer without a value.
    """
    tensors = _named_tensors(module)
    written: set[int] = set()
    init_weights: Any = module.init_weights
    values = init_weights(generator_for)
    if not isinstance(values, Iterable):
        _reject(module, f"it returned a {type(values).__qualname__}", "yield (name, value), or return a list of pairs")
    for name, value in values:
        if name not in tensors:
            problem = f"{name!r} is not one of the model's parameters or buffers"
            _reject(module, problem, "yield the names of named_parameters() and named_buffers()")
        if not isinstance(value, Tensor):
            _reject(module, f"a {type(value).__qualname__} for {name!r}", "yield tensors on the CPU")
        if value.shape != tensors[name].shape:
            problem = f"shape {tuple(value.shape)} for {name!r}, whose shape is {tuple(tensors[name].shape)}"
            _reject(module, problem, "yield full values of the global shape")
        write(name, value)
        written.add(id(tensors[name]))
    missing = sorted({name for name, tensor in tensors.items() if id(tensor) not in written})
    if missing:
        _reject(module, f"no value for {', '.join(missing)}", "yield these too, including computed buffers")


def fill_self(module: nn.Module) -> None:
    """Fill `module` with its initial values under torch's current seed, unless it is on the meta device. Local.

    Constructors call it: building under `torch.manual_seed(s)` then equals filling with `generators_for(s)`. Two models
    of one class under one seed are equal, whatever random numbers were drawn between them.
    """
    tensors = _named_tensors(module)
    if any(tensor.is_meta for tensor in tensors.values()):
        return

    def write(name: str, value: Tensor) -> None:
        with torch.no_grad():
            tensors[name].copy_(value)

    seed = torch.initial_seed()
    # torch returns seeds as unsigned 64-bit integers. Seeds in disttrain are signed.
    fill(module, generators_for(seed - 2**64 if seed >= 2**63 else seed), write)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return tensors


def _reject(module: nn.Module, problem: str, fix: str) -> NoReturn:
    raise ConfigError(
        explain(
            f"{type(module).__qualname__}.init_weights must yield a value for every parameter and buffer.", problem, fix
        )
    )
