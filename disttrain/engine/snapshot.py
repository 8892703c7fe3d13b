"""A run's checkpoints: what of the engine's parts goes into one, and how they come back out.

All functions are collective. Raises CheckpointError on every rank where one rank cannot write or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint import Checkpoint, Shard, save_checkpoint
from disttrain.config import Config
from disttrain.engine.buffers import share_buffers
from disttrain.engine.state import (
    optimizer_document,
    refuse_another_run,
    restore_optimizer,
    restore_tracked,
    tracked_shards,
    tracked_tensor_names,
)
from disttrain.errors import CheckpointError, DisttrainError, TrainingError, explain
from disttrain.strategy import AbstractStrategy, Prepared, World


@dataclass
class Progress:
    """Where a run stands, in numbers that no mesh changes; `positions` are those in the data, by the data's name."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of."""

    config: Config
    world: World
    strategy: AbstractStrategy
    prepared: Mapping[str, Prepared]
    tracked: Mapping[str, Any] = field(default_factory=dict)


def save(parts: Parts, root: Path, progress: Progress) -> Path:
    """Write and commit the checkpoint of this step; returns its folder."""
    group = parts.world.group
    replica = (group.rank, group.size)
    shards: list[Shard] = []
    users: dict[str, Any] = {}
    error: DisttrainError | None = None
    document: dict[str, Any] = {}
    for prepared in parts.prepared.values():
        share_buffers(prepared)
    try:
        for prepared in parts.prepared.values():
            shards += parts.strategy.shards(prepared)
            _refuse_non_finite(prepared, shards)
        for name, tracked in parts.tracked.items():
            more, users[name] = tracked_shards(name, tracked, replica)
            shards += more
        document = {
            "progress": {**vars(progress)},
            "config": parts.config.to_dict(),
            "folder": str(parts.config.folder),
            "optim": {name: optimizer_document(prepared) for name, prepared in parts.prepared.items()},
            "user": users,
            "writer": {"strategy": parts.config.strategy.name, "mesh": vars(parts.world.mesh.sizes)},
        }
    except DisttrainError as caught:
        error = caught
    group.agree(error, "collecting the checkpoint")
    return save_checkpoint(root, progress.steps, shards, document, group)


def _refuse_non_finite(prepared: Prepared, shards: Sequence[Shard]) -> None:
    """A checkpoint of weights that are not finite would be the end of every resume."""
    trained = {f"model/{prepared.name}/{one.name}" for one in prepared.named}
    for shard in shards:
        if shard.name in trained and not bool(torch.isfinite(shard.tensor).all()):
            raise TrainingError(
                explain(
                    "The weights that are saved are to be finite.",
                    f"{shard.name} is not; nothing was saved",
                    "go on from the checkpoint before: lower the learning rate, clip gradients (optim.clip_norm), "
                    "or set report.every=1, which looks at every step's gradient before it is applied",
                )
            )


def restore(parts: Parts, checkpoint: Checkpoint) -> Progress:
    """Put everything back into parts that are prepared already; nothing is kept of a checkpoint that does not fit."""
    error: BaseException | None = None
    try:
        refuse_another_run(str(checkpoint.path), checkpoint.document["config"], parts.config.to_dict())
        _restore(parts, checkpoint)
    except (CheckpointError, OSError, KeyError, ValueError) as caught:
        error = caught if isinstance(caught, CheckpointError) else _unreadable(checkpoint, caught)
    parts.world.group.agree(error, "loading the checkpoint")
    for prepared in parts.prepared.values():
        parts.strategy.loaded(prepared)
    return Progress(**checkpoint.document["progress"])


def _restore(parts: Parts, checkpoint: Checkpoint) -> None:
    document = checkpoint.document
    missing = [name for name in parts.prepared if name not in document["optim"]]
    if missing:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to continue the prepared models {', '.join(parts.prepared)}.",
                f"it holds {', '.join(document['optim'])}",
                "prepare the same models under the same names",
            )
        )
    shards: list[Shard] = []
    for prepared in parts.prepared.values():
        shards += parts.strategy.shards(prepared, checkpoint.tensors)
    checkpoint.load_into(shards, ignore={name for name in checkpoint.tensors if name.startswith("user/")})
    now, then = parts.config.to_dict(), document["config"]
    same = all(now.get(section) == then.get(section) for section in ("optim", "schedule"))
    for name, prepared in parts.prepared.items():
        restore_optimizer(prepared, document["optim"][name], same_settings=same)
    for name, tracked in parts.tracked.items():
        saved = document["user"].get(name)
        if saved is None:
            raise CheckpointError(
                explain(
                    f"{checkpoint.path} is to give {name!r} its state back.",
                    f"tracked objects {', '.join(document['user']) or 'none'}",
                    "track what was tracked when it was saved",
                )
            )
        restore_tracked(tracked, saved, {key: checkpoint.read(key) for key in tracked_tensor_names(saved)})


def others_than(checkpoint: Checkpoint, name: str) -> set[str]:
    """Every stored tensor that is no weight of the model of that name. Pure."""
    return {stored for stored in checkpoint.tensors if not stored.startswith(f"model/{name}/")}


def load_weights(parts: Parts, name: str, checkpoint: Checkpoint) -> None:
    """Only the model's own tensors, from a checkpoint of any strategy."""
    error: BaseException | None = None
    try:
        shards = [shard for shard in parts.strategy.shards(parts.prepared[name]) if shard.name.startswith("model/")]
        checkpoint.load_into(shards, ignore=others_than(checkpoint, name))
    except (CheckpointError, OSError) as caught:
        error = caught
    parts.world.group.agree(error, "loading weights")
    parts.strategy.loaded(parts.prepared[name])


def _unreadable(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        explain(
            f"{checkpoint.path} is to be loaded.",
            f"{type(error).__name__}: {error}",
            "remove or repair it: the run then goes on from the one before",
        )
    )
