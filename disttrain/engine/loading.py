"""Loads a trained model in one process, from weights in any format, without a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from disttrain.checkpoint import Checkpoint, Location, Shard, fingerprint, full_shard
from disttrain.checkpoint.formats import NativeWeights, match_weights
from disttrain.config import Config, load_config
from disttrain.engine import build
from disttrain.engine.checkpointing.frozen_parameters import (
    left_out_tensors,
    reject_other_frozen_parameters,
    to_hexadecimal,
)
from disttrain.engine.checkpointing.locate import open_any, open_newest
from disttrain.engine.checkpointing.restoring import other_names
from disttrain.errors import CheckpointError, explain
from disttrain.model import build_model
from disttrain.runtime.seeds import restored_generators

__all__ = ["config_of", "load", "open_newest"]


def config_of(checkpoint: Checkpoint) -> Config:
    """Return the config of the run that wrote a checkpoint. Import paths resolve as they did then. Local.

    Raises CheckpointError where the checkpoint was converted from another library's, which has no config.
    """
    document = checkpoint.document
    if not document.get("config"):
        origin = document.get("imported", {}).get("from", "a script")
        raise CheckpointError(
            explain(
                f"Cannot build the model of {checkpoint.path} from its config.",
                f"it has no config, because it came from {origin}",
                "pass the model: disttrain.load(path, make_model=...), or use a config with model.weights",
            )
        )
    folder = document.get("folder")
    return load_config(document["config"], folder=Path(folder) if folder else None)


def load(path: str | Location, *, name: str = "model", make_model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Load a trained model on the CPU, in evaluation mode. Local.

    Where a checkpoint holds trainable parameters alone, the frozen ones come from the run's initial weights or from its
    `model.weights`.

    Args:
        path: a run's folder, a checkpoint of any strategy, a Hugging Face folder, a safetensors file, a file of
            torch.save, or a checkpoint of torch DCP or DeepSpeed.
        name: the name under which the model was prepared.
        make_model: returns the module. Needed where no config says what to build: for other libraries' weights, and
            for a run whose model came from Python.

    Raises:
        CheckpointError: nothing can be loaded from `path`, names or shapes differ, or the frozen parameters do.
    """
    weights = open_any(path, name)
    if make_model is None and isinstance(weights, NativeWeights):
        make_model = configured_model(weights.checkpoint)
    if make_model is None:
        raise CheckpointError(
            explain(
                f"Cannot build the model of {path}.",
                "it holds weights without a config",
                "pass make_model=, a function that returns the module",
            )
        )
    checkpoint = weights.checkpoint if isinstance(weights, NativeWeights) else None
    every = left_out_tensors(checkpoint) if checkpoint is not None else {}
    left_out = {key: value for key, value in every.items() if key.startswith(f"model/{name}/")}
    config = (
        config_of(checkpoint) if checkpoint is not None and left_out and checkpoint.document.get("config") else None
    )
    with restored_generators():  # building a model must not change the caller's random numbers
        model = build_model(make_model, seed=config.run.seed if config else 0, meta=False)
    shards, aliases = _shards(model, name), other_names(model)
    if config is not None and config.model is not None and config.model.weights:
        first = open_any(config.model.weights, name)
        first.fill(match_weights(first, shards, owner=name, aliases=aliases, strict=config.model.weights_strict)[1])
    stored = [shard for shard in shards if shard.name not in left_out]
    weights.fill(match_weights(weights, stored, owner=name, aliases=aliases)[1])
    if checkpoint is not None:
        kept = [shard for shard in shards if shard.name in left_out]
        found = {shard.name: to_hexadecimal(fingerprint(shard)) for shard in kept}
        reject_other_frozen_parameters(checkpoint, left_out, found)
    return model.eval()


def configured_model(checkpoint: Checkpoint) -> Callable[[], nn.Module]:
    """Return the model factory of the checkpoint's config. Local. Raises CheckpointError where it has no model."""
    config = config_of(checkpoint)
    if config.model is None:
        raise CheckpointError(
            explain(f"Cannot build the model of {checkpoint.path}.", "its config has no model", "pass make_model=")
        )
    return build.model_factory(config)


def _shards(model: nn.Module, name: str) -> list[Shard]:
    state = set(model.state_dict())
    tensors = [*model.named_parameters(), *((key, buffer) for key, buffer in model.named_buffers() if key in state)]
    return [full_shard(f"model/{name}/{key}", tensor.detach()) for key, tensor in tensors]
