"""A run's checkpoints: what of the engine's parts goes into one, and how they come back out.

All functions are collective. Raises CheckpointError on every rank where one rank cannot write or read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disttrain.checkpoint import Checkpoint, Differences, Shard, save_checkpoint
from disttrain.checkpoint.formats import Rename, load_weights_into, open_weights
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
from disttrain.errors import CheckpointError, TrainingError, explain
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
    for prepared in parts.prepared.values():
        share_buffers(prepared)
    group = parts.world.group
    shards, document = group.together(lambda: _collect(parts, progress), "collecting the checkpoint")
    return save_checkpoint(root, progress.steps, shards, document, group)


def _collect(parts: Parts, progress: Progress) -> tuple[list[Shard], dict[str, Any]]:
    """What this rank brings, and the document. Local."""
    replica = (parts.world.group.rank, parts.world.group.size)
    shards: list[Shard] = []
    users: dict[str, Any] = {}
    for prepared in parts.prepared.values():
        own = parts.strategy.shards(prepared)
        _refuse_non_finite(prepared, own)
        shards += own
    for name, tracked in parts.tracked.items():
        more, users[name] = tracked_shards(name, tracked, replica)
        shards += more
    return shards, {
        "progress": {**vars(progress)},
        "config": parts.config.to_dict(),
        "folder": str(parts.config.folder),
        "optim": {name: optimizer_document(prepared) for name, prepared in parts.prepared.items()},
        "user": users,
        "writer": {"strategy": parts.config.strategy.name, "mesh": vars(parts.world.mesh.sizes)},
    }


def _refuse_non_finite(prepared: Prepared, shards: Sequence[Shard]) -> None:
    """A checkpoint of weights that are not finite would be the end of every resume."""
    trained = {
        f"{kind}/{prepared.name}/{name}"
        for kind, module in (("model", prepared.model), ("objective", prepared.objective))
        for name, parameter in (module.named_parameters() if module is not None else ())
        if parameter.requires_grad
    }
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
    parts.world.group.together(lambda: _restore(parts, checkpoint), "loading the checkpoint")
    for prepared in parts.prepared.values():
        parts.strategy.loaded(prepared)
    return Progress(**checkpoint.document["progress"])


def _restore(parts: Parts, checkpoint: Checkpoint) -> None:
    if "imported" in checkpoint.document:  # what came from another library knows no config
        _refuse_weights_alone(checkpoint)
    else:
        refuse_another_run(str(checkpoint.path), checkpoint.document["config"], parts.config.to_dict())
    try:
        _put_back(parts, checkpoint)
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to be loaded.",
                f"{type(error).__name__}: {error}",
                "remove or repair it: the run then goes on from the one before",
            )
        ) from error


def _refuse_weights_alone(checkpoint: Checkpoint) -> None:
    if not checkpoint.document["optim"]:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to be continued.",
                "weights alone, converted from another library's",
                f"start from them: model.weights={checkpoint.path}",
            )
        )


def _put_back(parts: Parts, checkpoint: Checkpoint) -> None:
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
    same = "imported" not in document and all(now.get(key) == then.get(key) for key in ("optim", "schedule"))
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


def load_weights(
    parts: Parts, name: str, path: str | Path, *, strict: bool, only: Sequence[str], rename: Rename | None
) -> Differences:
    """Only the model's own tensors, from any format that `open_weights` knows; each rank reads its boxes."""
    prepared = parts.prepared[name]

    def fill() -> Differences:
        shards = [shard for shard in parts.strategy.shards(prepared) if shard.name.startswith(f"model/{name}/")]
        return load_weights_into(
            open_weights(path, name),
            shards,
            owner=name,
            aliases=other_names(prepared.model),
            strict=strict,
            only=only,
            rename=rename,
            do="use the model these weights are of; where some are to differ, set model.weights_strict=false, or call "
            "engine.load_weights with strict=False, only=[...] or rename=",
        )

    differences = parts.world.group.together(fill, f"loading weights from {path}")
    parts.strategy.loaded(prepared)
    return differences


def other_names(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, to the first, which is the canonical one. Local."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    pairs = [(name, first.setdefault(id(parameter), name)) for name, parameter in named]
    return {name: canonical for name, canonical in pairs if name != canonical}


def load_for_evaluation(parts: Parts, name: str, checkpoint: Checkpoint) -> None:
    """Weights and updates of one prepared model and of its objective, whatever else the checkpoint holds.

    Raises CheckpointError where it is another run's, or names or shapes differ.
    """
    refuse_another_run(str(checkpoint.path), checkpoint.document["config"], parts.config.to_dict())
    refuse_unknown(checkpoint, name)
    _load(parts, name, checkpoint, lambda shard: True)
    parts.prepared[name].updates = int(checkpoint.document["optim"][name]["updates"])  # what draws are keyed by


def refuse_unknown(checkpoint: Checkpoint, name: str) -> None:
    """Raise CheckpointError where the checkpoint knows no prepared model of that name. Local."""
    known = list(checkpoint.document.get("optim", ()))
    if known and name not in known:
        raise CheckpointError(
            explain(
                f"The model {name!r} of {checkpoint.path} is to be loaded.",
                f"models prepared as {', '.join(known)}",
                f"name one of them: disttrain.load(path, name={known[0]!r})",
            )
        )


def _load(parts: Parts, name: str, checkpoint: Checkpoint, wanted: Callable[[Shard], bool]) -> None:
    prepared = parts.prepared[name]

    def fill() -> None:
        shards = [shard for shard in parts.strategy.shards(prepared) if wanted(shard)]
        checkpoint.load_into(shards, ignore=others_than(checkpoint, name) - {shard.name for shard in shards})

    parts.world.group.together(fill, "loading weights")
    parts.strategy.loaded(prepared)
