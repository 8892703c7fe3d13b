"""How a model's first values come to be: by its constructor under the seed, or tensor by tensor where it says how.

A model says how by a method `init_weights(generator_for)` that yields (name, whole value) for every parameter and
buffer, from shapes alone. Only then may it be built on the meta device: `reset_parameters` is no promise (it makes
nanoGPT's 0.02 a 1.0, and leaves computed buffers unwritten). Refuses values nobody wrote.
Enters: strategy (build and fill), the models here (`fill_self`).
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
    """Call `make` under `seed`, on the host, or with shapes only where `meta`. Local; raises ConfigError.

    The seeds stay set: what follows the constructor draws as it would in a plain script.
    """
    seed_everything(seed)
    with torch.device("meta") if meta else nullcontext():
        model = make()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            explain(
                "model.target is to return a torch.nn.Module.",
                f"a {type(model).__qualname__}",
                "name the module's class, or a function that returns a module",
            )
        )
    return model


def says_how(maker: Any) -> bool:
    """Whether a module, its class, or a partial or `functools.wraps` of its class brings `init_weights(generator_for)`.

    An inherited one does not speak for a subclass with a constructor of its own, which may make more, or other values.
    Any other factory is not looked into: calling it to find out might download a model. Local, builds nothing.
    """
    while not isinstance(maker, nn.Module | type):
        if isinstance(maker, functools.partial):
            maker = maker.func
        elif hasattr(maker, "__wrapped__"):
            maker = maker.__wrapped__
        else:
            return False
    method = getattr(maker, "init_weights", None)
    # Many models have an `init_weights(self)` that fills in place: another thing under the same name.
    if not callable(method) or "generator_for" not in inspect.signature(method).parameters:
        return False
    classes = (maker if isinstance(maker, type) else type(maker)).__mro__
    nearest = next(one for one in classes if {"__init__", "init_weights"} & vars(one).keys())
    return "init_weights" in vars(nearest)


def fill(module: nn.Module, generator_for: GeneratorFor, write: Write) -> None:
    """Hand every initial value of `module` to `write(name, value)`, one whole CPU tensor at a time. Local.

    A tensor with several names (a tie) is written under any one of them. Raises ConfigError for names that do not
    exist, for shapes that differ, and for every parameter or buffer that nobody wrote.
    """
    places: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    places.update(module.named_buffers(remove_duplicate=False))
    written: set[int] = set()
    init_weights: Any = module.init_weights
    values = init_weights(generator_for)
    if not isinstance(values, Iterable):
        _refuse(module, f"{type(values).__qualname__}, nothing to go through", "yield (name, value), or return pairs")
    for name, value in values:
        if name not in places:
            _refuse(
                module, f"{name!r}, which is none of its parameters or buffers", "yield names as named_parameters()"
            )
        if not isinstance(value, Tensor):
            _refuse(module, f"a {type(value).__qualname__} for {name!r}", "yield tensors, on the CPU")
        if value.shape != places[name].shape:
            shapes = f"{tuple(value.shape)} for {name!r}, whose shape is {tuple(places[name].shape)}"
            _refuse(module, shapes, "yield whole values, of the global shape")
        write(name, value)
        written.add(id(places[name]))
    missing = sorted({name for name, place in places.items() if id(place) not in written})
    if missing:
        _refuse(module, f"nothing for {', '.join(missing)}", "yield them too, computed buffers as well")


def fill_self(module: nn.Module) -> None:
    """Give `module` its initial values under torch's current seed; on the meta device there is nothing to give. Local.

    For constructors: `torch.manual_seed(s)` and then building equals filling with `generators_for(s)`. So two of one
    class under one seed are alike, whatever was drawn between.
    """
    places: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    places.update(module.named_buffers(remove_duplicate=False))
    if any(place.is_meta for place in places.values()):
        return

    def write(name: str, value: Tensor) -> None:
        with torch.no_grad():
            places[name].copy_(value)

    seed = torch.initial_seed()
    # torch shows seeds as unsigned 64-bit numbers; seeds here are signed.
    fill(module, generators_for(seed - 2**64 if seed >= 2**63 else seed), write)


def _refuse(module: nn.Module, found: str, do: str) -> NoReturn:
    raise ConfigError(
        explain(f"{type(module).__qualname__}.init_weights yields every parameter's and buffer's value.", found, do)
    )
