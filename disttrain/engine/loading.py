"""`disttrain.load`: a trained model on one process, from weights of any format, without a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from disttrain.checkpoint import Checkpoint, Location, Shard, fingerprint, full_shard
from disttrain.checkpoint.formats import NativeWeights, match_weights
from disttrain.config import Config, load_config
from disttrain.engine import build
from disttrain.engine.checkpointing.frozen_parameters import base_of, hexadecimal, refuse_other_base
from disttrain.engine.checkpointing.opening import open_any, open_newest
from disttrain.engine.checkpointing.restoring import other_names
from disttrain.errors import CheckpointError, explain
from disttrain.model import build_model
from disttrain.runtime.seeds import restored_generators

__all__ = ["config_of", "load", "open_newest"]


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that a checkpoint was written under; import paths resolve as they did then. Local.

    Raises CheckpointError where it was converted from another library's, which knows none.
    """
    document = checkpoint.document
    if not document.get("config"):
        origin = document.get("imported", {}).get("from", "a script")
        raise CheckpointError(
            explain(
                f"The config of {checkpoint.path} is to say what to build.",
                f"none in it: it came from {origin}",
                "bring the model yourself: disttrain.load(path, make_model=...), or a config with model.weights",
            )
        )
    folder = document.get("folder")
    return load_config(document["config"], folder=Path(folder) if folder else None)


def load(path: str | Location, *, name: str = "model", make_model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The trained module, on the CPU, in evaluation mode. Local.

    `path` is a run's folder, one checkpoint of any strategy, a Hugging Face folder, a safetensors file, a file of
    torch.save, or a checkpoint of torch DCP or DeepSpeed. `make_model` is needed where no config says what to build:
    for all but a run and its checkpoints, and where the run's model came from Python. Trainable parameters saved alone
    are laid over the run's own base: its initial weights, or those of `model.weights`. Raises CheckpointError where
    names or shapes differ, or the base is another.
    """
    weights = open_any(path, name)
    if make_model is None and isinstance(weights, NativeWeights):
        make_model = configured_model(weights.checkpoint)
    if make_model is None:
        raise CheckpointError(
            explain(
                f"The model of {path} is to be built.",
                "weights, and no config that says of what",
                "pass make_model=, a function that returns the module",
            )
        )
    checkpoint = weights.checkpoint if isinstance(weights, NativeWeights) else None
    every = base_of(checkpoint) if checkpoint is not None else {}
    left_out = {key: value for key, value in every.items() if key.startswith(f"model/{name}/")}
    config = (
        config_of(checkpoint) if checkpoint is not None and left_out and checkpoint.document.get("config") else None
    )
    with restored_generators():  # the caller's own draws go on as if nothing had been built
        model = build_model(make_model, seed=config.run.seed if config else 0, meta=False)
    shards, aliases = _shards(model, name), other_names(model)
    if config is not None and config.model is not None and config.model.weights:
        base = open_any(config.model.weights, name)
        base.fill(match_weights(base, shards, owner=name, aliases=aliases, strict=config.model.weights_strict)[1])
    stored = [shard for shard in shards if shard.name not in left_out]
    weights.fill(match_weights(weights, stored, owner=name, aliases=aliases)[1])
    if checkpoint is not None:
        kept = [shard for shard in shards if shard.name in left_out]
        refuse_other_base(checkpoint, left_out, {shard.name: hexadecimal(fingerprint(shard)) for shard in kept})
    return model.eval()


def configured_model(checkpoint: Checkpoint) -> Callable[[], nn.Module]:
    """What builds the model of the checkpoint's own config. Local; CheckpointError where it names none."""
    config = config_of(checkpoint)
    if config.model is None:
        raise CheckpointError(
            explain(f"The model of {checkpoint.path} is to be built.", "a config without a model", "pass make_model=")
        )
    return build.model_factory(config)


def _shards(model: nn.Module, name: str) -> list[Shard]:
    state = set(model.state_dict())
    tensors = [*model.named_parameters(), *((key, buffer) for key, buffer in model.named_buffers() if key in state)]
    return [full_shard(f"model/{name}/{key}", tensor.detach()) for key, tensor in tensors]
