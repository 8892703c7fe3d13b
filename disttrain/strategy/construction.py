"""Builds a model with equal weights on every rank, then its optimizer and schedule.

The model's constructor runs under the seed, on the host. Every strategy shards the weights that its rank has built, so
a constructor that gives different weights on another rank is rejected.
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
    """Build the model under the seed, on the host and in the world's dtype. Collective."""
    model = build_model(ingredients.make_model, seed=world.seed, meta=False)
    settle(world, model)
    check_same_everywhere(world, model, ingredients.name)
    return model


def settle(world: World, model: nn.Module) -> None:
    """Cast a model that was just built to the world's dtype, and apply the config's memory savers. Local.

    Every strategy calls this before it wraps or shards the model, which is on the host or the meta device. Raises
    ConfigError.
    """
    _reject_unready(world, model)
    cast(model, world.dtype)
    save_memory(model, world.memory)


def _reject_unready(world: World, model: nn.Module) -> None:
    """Raise ConfigError for parameters without a shape, and for embeddings that a forward changes.

    An embedding with max_norm changes the rows that it looks up, which differ between ranks.
    """
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        problem = f"these parameters are lazy and have no shape yet: {', '.join(lazy[:5])}"
        fix = "call the model once on a small batch in its constructor"
        raise ConfigError(explain("Cannot train the model.", problem, fix))
    renormed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm and module.weight.requires_grad
    ]
    if renormed and world.group.size > 1:
        raise ConfigError(
            explain(
                "Cannot keep the model's weights equal on all ranks.",
                f"max_norm of {', '.join(renormed[:5])}: each rank's forward changes the rows that it looks up",
                "leave max_norm out, and scale the looked-up vectors in the model's forward",
            )
        )


def lay_out_rows(model: nn.Module) -> None:
    """Make parameters contiguous, for strategies that shard them or read their rows. Values do not change. Local.

    A parameter may have another layout, such as channels_last or that of a transposed tensor.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters and buffers to `dtype`, and the floating-point inputs of later forwards. Local.

    float32 changes nothing: it is what constructors make.
    """
    if dtype == torch.float32:
        return
    module.to(dtype)
    module.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, (args, kwargs))


def check_same_everywhere(world: World, model: nn.Module, name: str) -> None:
    """Raise ConfigError on all ranks where initial weights, or which of them are frozen, differ. Collective."""
    sums = world.group.gather_all([(key, _checksum(value), value.requires_grad) for key, value in _tensors(model)])
    for rank, theirs in enumerate(sums):
        if theirs != sums[0]:
            pairs = zip(sums[0], theirs, strict=False)
            mine, other = next(((a, b) for a, b in pairs if a != b), (("their number", 0, False), None))
            first = f"whether {mine[0]!r} is frozen" if other and mine[:2] == other[:2] else repr(mine[0])
            raise ConfigError(
                explain(
                    f"Cannot train {name!r}: its constructor gives different weights on different ranks.",
                    f"rank {rank} differs from rank 0, first in {first}",
                    "draw random numbers from torch's, numpy's or Python's default generators only, in a fixed order",
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
    """Return the trainable parameters with global shapes, each tensor once. The objective's start with `objective.`."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    known = {id(parameter) for _, parameter in named}
    for name, parameter in objective.named_parameters() if objective is not None else ():
        if parameter.requires_grad and id(parameter) not in known:
            named.append((f"objective.{name}", parameter))
    return tuple(NamedParameter(name, parameter, parameter.shape) for name, parameter in named)


def reject_unfrozen(prepared: Prepared) -> None:
    """Raise ConfigError for parameters that were unfrozen after the optimizer was built, which does not know them.

    Local. Call it after a step, when every strategy has restored its parameters.
    """
    known = {id(one.parameter) for one in prepared.named}
    late = [name for name, one in prepared.model.named_parameters() if one.requires_grad and id(one) not in known]
    if late:
        raise ConfigError(
            explain(
                f"Cannot train parameters of {prepared.name!r} that were unfrozen after it was prepared.",
                f"these are in no optimizer: {', '.join(late[:5])}{', ...' if late[5:] else ''}",
                "save, then load the weights (model.weights, load_weights) in an engine that prepares them unfrozen",
            )
        )


def reject_changed(names: Sequence[str], when: str, strategy: str) -> None:
    """Raise TrainingError for weights that user code changed in a gathered copy, which does not reach the shards."""
    more = ", ..." if names[5:] else ""
    raise TrainingError(
        explain(
            f"Cannot keep weights that your code changes under {strategy}.",
            f"these were changed {when}, and the change would be lost: {', '.join(names[:5])}{more}",
            "use torch.nn.utils.parametrize, or strategy ddp; fsdp keeps changes between steps",
        )
    )


def equip(prepared: Prepared, ingredients: Ingredients, named: Sequence[NamedParameter]) -> None:
    """Build optimizer and schedule over `named`. Without an optimizer the model is frozen. Local.

    Raises ConfigError for a model without trainable parameters.
    """
    if ingredients.make_optimizer is None:
        for parameter in prepared.model.parameters():
            parameter.requires_grad_(False)
        prepared.model.eval()
        return
    if not named:
        raise ConfigError(
            explain(
                f"Cannot train {prepared.name!r}.",
                "none of its parameters requires a gradient",
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
