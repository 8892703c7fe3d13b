"""`disttrain.load`: a trained model on one process, from any strategy's checkpoint, without a process group.

Also what an evaluation alone needs of a checkpoint: weights, and neither optimizer, schedule nor other models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from disttrain.checkpoint import Checkpoint, Shard, SoleRank, newest_whole, whole_shard
from disttrain.config import Config, load_config
from disttrain.engine import build
from disttrain.engine.snapshot import Parts, others_than
from disttrain.engine.state import refuse_another_run
from disttrain.errors import CheckpointError, explain
from disttrain.model import build_model
from disttrain.runtime.seeds import restored_generators


def open_newest(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run whose folder `path` is. Local.

    Raises CheckpointError where there is none, with what was found.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            explain(f"{path} is to be loaded.", "no such folder", "name a run's folder or a checkpoint")
        )
    root = path / "checkpoints"
    if not root.is_dir():
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


def load(path: str | Path, *, name: str = "model", make_model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The trained module, on the CPU, in evaluation mode, from a run's folder or one checkpoint of any strategy. Local.

    `make_model` is needed where the run's model came from Python and not from its config. Raises CheckpointError where
    names or shapes differ.
    """
    checkpoint = open_newest(path)
    _refuse_unknown(checkpoint, name)
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


def load_for_evaluation(parts: Parts, name: str, checkpoint: Checkpoint) -> None:
    """Weights and updates of one prepared model and of its objective, whatever else the checkpoint holds. Local.

    Raises CheckpointError where it is another run's, or names or shapes differ.
    """
    refuse_another_run(str(checkpoint.path), checkpoint.document["config"], parts.config.to_dict())
    _refuse_unknown(checkpoint, name)
    prepared = parts.prepared[name]
    shards = parts.strategy.shards(prepared)
    wanted = {shard.name for shard in shards}
    checkpoint.load_into(shards, ignore=others_than(checkpoint, name) - wanted)
    prepared.updates = int(checkpoint.document["optim"][name]["updates"])  # an objective's draws are keyed by it
    parts.strategy.loaded(prepared)


def _refuse_unknown(checkpoint: Checkpoint, name: str) -> None:
    known = list(checkpoint.document.get("optim", ()))
    if known and name not in known:
        raise CheckpointError(
            explain(
                f"The model {name!r} of {checkpoint.path} is to be loaded.",
                f"models prepared as {', '.join(known)}",
                f"name one of them: disttrain.load(path, name={known[0]!r})",
            )
        )


def _shards(model: nn.Module, name: str) -> list[Shard]:
    state = set(model.state_dict())
    tensors = [*model.named_parameters(), *((key, buffer) for key, buffer in model.named_buffers() if key in state)]
    return [whole_shard(f"model/{name}/{key}", tensor.detach()) for key, tensor in tensors]
