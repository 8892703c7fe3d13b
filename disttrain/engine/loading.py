"""`disttrain.load`: a trained model on one process, from any strategy's checkpoint, without a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from disttrain.checkpoint import Checkpoint, Place, Shard, SoleRank, newest_whole, place_of, storage_of, whole_shard
from disttrain.config import Config, load_config
from disttrain.engine import build
from disttrain.engine.places import checkpoints_in
from disttrain.engine.snapshot import others_than, refuse_unknown
from disttrain.errors import CheckpointError, explain
from disttrain.model import build_model
from disttrain.runtime.seeds import restored_generators


def open_newest(path: str | Place) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run whose folder `path` is. Local.

    Raises CheckpointError where there is none, with what was found.
    """
    path = place_of(path)
    if not storage_of(path).taken(path):
        raise CheckpointError(
            explain(f"{path} is to be loaded.", "no such folder", "name a run's folder or a checkpoint")
        )
    root = checkpoints_in(path)
    if root is None:
        return Checkpoint.open(path)
    found, rejected = newest_whole(root, SoleRank())
    if found is None:
        reasons = "; ".join(f"{one.name}: {reason}" for one, reason in rejected) or "no committed checkpoint"
        raise CheckpointError(explain(f"{path} is to be loaded.", reasons, "train it first, or name another run"))
    return found


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that a checkpoint was written under; import paths resolve as they did then. Local."""
    folder = checkpoint.document.get("folder")
    return load_config(checkpoint.document["config"], folder=Path(folder) if folder else None)


def load(path: str | Place, *, name: str = "model", make_model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The trained module, on the CPU, in evaluation mode, from a run's folder or one checkpoint of any strategy. Local.

    `make_model` is needed where the run's model came from Python and not from its config. Raises CheckpointError where
    names or shapes differ.
    """
    checkpoint = open_newest(path)
    refuse_unknown(checkpoint, name)
    if make_model is None:
        config = config_of(checkpoint)
        if config.model is None:
            raise CheckpointError(
                explain(f"The model of {path} is to be built.", "a config without a model", "pass make_model=")
            )
        make_model = build.model_factory(config)
    with restored_generators():  # the caller's own draws go on as if nothing had been built
        model = build_model(make_model, seed=0, meta=False)
    checkpoint.load_into(_shards(model, name), ignore=others_than(checkpoint, name))
    return model.eval()


def _shards(model: nn.Module, name: str) -> list[Shard]:
    state = set(model.state_dict())
    tensors = [*model.named_parameters(), *((key, buffer) for key, buffer in model.named_buffers() if key in state)]
    return [whole_shard(f"model/{name}/{key}", tensor.detach()) for key, tensor in tensors]
