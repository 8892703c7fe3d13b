"""How a model comes to be on every rank alike: its constructor under the seed, on the host, then cast and placed.

Refuses a constructor that gives other weights on another rank: every strategy cuts what it finds on its own rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.model import build_model
from disttrain.optim.named import NamedParameter
from disttrain.strategy.contract import Ingredients, Prepared, World
from disttrain.strategy.memory_savers import save_memory
from disttrain.torch_internals import map_tensors


def build_on_host(world: World, ingredients: Ingredients) -> nn.Module:
    """The model as its constructor makes it under the seed, in the world's dtype, still on the host. Collective."""
    model = build_model(ingredients.make_model, seed=world.seed, meta=False)
    settle(world, model)
    check_same_everywhere(world, model, ingredients.name)
    return model


def settle(world: World, model: nn.Module) -> None:
    """What every strategy does to a model that was just built, on the host or the meta device, before it wraps or cuts:
    the world's dtype, and its memory savers. Local; raises ConfigError."""
    _reject_unready(world, model)
    cast(model, world.dtype)
    save_memory(model, world.memory)


def _reject_unready(world: World, model: nn.Module) -> None:
    """Raise ConfigError for parameters without a shape, and for tables whose rows a forward changes: each rank would
    change those that it looks up, and ranks come to hold other tables."""
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        do = "let the model's constructor call it once on a small batch"
        raise ConfigError(explain("A model's parameters are to have shapes.", f"lazy ones: {', '.join(lazy[:5])}", do))
    renormed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm and module.weight.requires_grad
    ]
    if renormed and world.group.size > 1:
        raise ConfigError(
            explain(
                "Every rank is to hold the same weights.",
                f"max_norm of {', '.join(renormed[:5])}: a forward changes the rows that its own rank looks up",
                "leave max_norm out, and scale what is looked up in the model's forward",
            )
        )


def lay_out_rows(model: nn.Module) -> None:
    """Parameters contiguous, for strategies that cut them or look at their rows: another layout (channels_last, a
    transposed tensor) changes no value. Local."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating parameters and buffers where a dtype other than the constructor's is asked for, and from then on
    the floating tensors that its forward is called with."""
    if dtype == torch.float32:
        return
    module.to(dtype)
    module.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, (args, kwargs))


def check_same_everywhere(world: World, model: nn.Module, name: str) -> None:
    """Collective; raises ConfigError on all ranks where their initial weights differ, or which of them are frozen."""
    sums = world.group.gather_all([(key, _checksum(value), value.requires_grad) for key, value in _tensors(model)])
    for rank, theirs in enumerate(sums):
        if theirs != sums[0]:
            pairs = zip(sums[0], theirs, strict=False)
            mine, other = next(((a, b) for a, b in pairs if a != b), (("their number", 0, False), None))
            first = f"whether {mine[0]!r} is frozen" if other and mine[:2] == other[:2] else repr(mine[0])
            raise ConfigError(
                explain(
                    f"The constructor of {name!r} is to give the same weights on every rank under one seed.",
                    f"rank {rank} differs from rank 0, first in {first}",
                    "draw what it draws from torch's, numpy's or Python's default generators only, in a fixed order",
                )
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _checksum(tensor: Tensor) -> int:
    if tensor.is_meta:
        return 0
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def name_parameters(model: nn.Module, objective: nn.Module | None) -> tuple[NamedParameter, ...]:
    """The trainable parameters, each tensor once, with their global shapes; the objective's under `objective.`."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    known = {id(parameter) for _, parameter in named}
    for name, parameter in objective.named_parameters() if objective is not None else ():
        if parameter.requires_grad and id(parameter) not in known:
            named.append((f"objective.{name}", parameter))
    return tuple(NamedParameter(name, parameter, parameter.shape) for name, parameter in named)


def reject_unfrozen(prepared: Prepared) -> None:
    """Raise ConfigError for parameters that were frozen when the optimizer was made: nothing would train them. Local.

    Asked after a step, when every strategy has its own parameters in place again.
    """
    known = {id(one.parameter) for one in prepared.named}
    late = [name for name, one in prepared.model.named_parameters() if one.requires_grad and id(one) not in known]
    if late:
        raise ConfigError(
            explain(
                f"{prepared.name!r} trains what required a gradient when it was prepared.",
                f"{', '.join(late[:5])}{', ...' if late[5:] else ''}, unfrozen later: in no optimizer",
                "save, and go on from the weights (model.weights, load_weights) in an engine that prepares it unfrozen",
            )
        )


def reject_changed(names: Sequence[str], when: str, strategy: str) -> None:
    """Raise TrainingError for weights that user code changed where no rank's part of them learns of it."""
    raise TrainingError(
        explain(
            f"Under {strategy} weights are changed by the optimizer's step alone.",
            f"{', '.join(names[:5])}{', ...' if names[5:] else ''}, changed by hand {when}, which would be lost",
            "use torch.nn.utils.parametrize, or strategy ddp; fsdp takes changes between steps",
        )
    )


def equip(prepared: Prepared, ingredients: Ingredients, named: Sequence[NamedParameter]) -> None:
    """Build optimizer and schedule over `named`. Raises ConfigError for a model without trainable parameters."""
    if ingredients.make_optimizer is None:
        for parameter in prepared.model.parameters():
            parameter.requires_grad_(False)
        prepared.model.eval()
        return
    if not named:
        raise ConfigError(
            explain(
                f"{prepared.name!r} is to be trained.",
                "no parameter that requires a gradient",
                "leave some parameters trainable, or prepare it without an optimizer",
            )
        )
    prepared.named = tuple(named)
    prepared.optimizer = ingredients.make_optimizer(named)
    names = {id(one.parameter): one.name for one in named}
    prepared.members = tuple(
        tuple(names[id(parameter)] for parameter in group["params"] if id(parameter) in names)
        for group in prepared.optimizer.param_groups
    )
    if ingredients.make_schedule is not None:
        prepared.schedule = ingredients.make_schedule(prepared.optimizer)
