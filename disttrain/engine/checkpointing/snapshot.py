"""Collects what a checkpoint of a run contains, and writes it. `restoring` reads it back.

All functions are collective. They raise CheckpointError on every rank where one rank cannot write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.checkpoint import LocationT, PlanCache, Ranks, Shard, save_checkpoint
from disttrain.config import Config
from disttrain.engine.checkpointing.documents import tracked_shards
from disttrain.engine.checkpointing.frozen_parameters import FrozenFingerprints
from disttrain.engine.checkpointing.optimizer_groups import optimizer_document
from disttrain.engine.checkpointing.random_state import random_shards
from disttrain.errors import TrainingError, explain
from disttrain.strategy import AbstractStrategy, Prepared, World
from disttrain.strategy.buffers import share_buffers

RANKS = "$ranks"
"""The key of a tracked object's states in the document, one state for each rank."""


@dataclass
class Progress:
    """A run's progress so far, in numbers that do not depend on the mesh.

    Attributes:
        steps: optimizer steps, including steps that were skipped.
        samples: samples trained on, over all ranks.
        tokens: tokens trained on, over all ranks; 0 where the dataset does not state `tokens_per_sample`.
        skipped: steps that changed nothing, because a loss or a gradient was not finite or all weights were zero.
        positions: the position in each dataset, by the dataset's name.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tracked:
    """A user's object that is saved and restored: one state for all ranks, or one for each rank."""

    thing: Any
    per_rank: bool = False


@dataclass(frozen=True)
class Parts:
    """The parts of a run that a checkpoint is made of."""

    config: Config
    world: World
    strategy: AbstractStrategy
    prepared: Mapping[str, Prepared]
    tracked: Mapping[str, Tracked] = field(default_factory=dict)
    frozen: FrozenFingerprints = field(default_factory=FrozenFingerprints)


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of the checkpoint of a step. `trained` names the tensors that must be finite."""

    step: int
    shards: Sequence[Shard]
    document: Mapping[str, Any]
    trained: frozenset[str]


def take(parts: Parts, progress: Progress, evaluation: Mapping[str, float]) -> Snapshot:
    """Return this rank's part of the checkpoint of this step. It refers to live tensors, which a step changes."""
    for prepared in parts.prepared.values():
        share_buffers(prepared)
    group = parts.world.group
    shards, per_rank, document = group.together(lambda: _collect(parts, progress), "collecting the checkpoint")
    if per_rank:
        of_all_ranks = group.gather_all(per_rank)
        document["user"] |= {name: {RANKS: [states[name] for states in of_all_ranks]} for name in per_rank}
    if parts.config.checkpoint.only == "trainable":
        frozen = frozen_names(parts.prepared)
        left_out = [shard for shard in shards if shard.name in frozen]
        document["base"] = parts.frozen.compute(left_out, group)
        shards = [shard for shard in shards if shard.name not in frozen]
    document["evaluation"] = dict(evaluation)
    return Snapshot(progress.steps, shards, document, frozenset(_trained(parts.prepared)))


def commit(snapshot: Snapshot, root: LocationT, ranks: Ranks, plans: PlanCache | None = None) -> LocationT:
    """Write a snapshot as a checkpoint and return its folder. Collective over `ranks`; any thread may call it.

    Raises TrainingError on every rank where weights are not finite: no run could resume from that checkpoint.
    """
    name = next(
        (shard.name for shard in snapshot.shards if shard.name in snapshot.trained and not _is_finite(shard.tensor)),
        None,
    )
    found = ranks.gather(name)
    first = ranks.broadcast(next((one for one in found if one is not None), None) if found is not None else None)
    if first is not None:
        raise TrainingError(
            explain(
                "Cannot save weights that are not finite.",
                f"{first} is not finite; nothing was saved",
                "continue from the checkpoint before: lower the learning rate, clip gradients (optim.clip_norm), "
                "or set report.every=1, which checks every step's gradient before it is applied",
            )
        )
    return save_checkpoint(root, snapshot.step, snapshot.shards, snapshot.document, ranks, plans=plans)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite. One pass without a copy; `isfinite` takes three passes."""
    return not tensor.numel() or bool(torch.linalg.vector_norm(tensor.detach(), math.inf).isfinite())


def _collect(parts: Parts, progress: Progress) -> tuple[list[Shard], dict[str, Any], dict[str, Any]]:
    """Return this rank's shards, the tracked states of this rank alone, and the document. Local."""
    group = parts.world.group
    shards = random_shards(group.rank, group.size, parts.world.device)
    per_rank: dict[str, Any] = {}
    users: dict[str, Any] = {}
    for prepared in parts.prepared.values():
        shards += parts.strategy.shards(prepared)
    for name, tracked in parts.tracked.items():
        if tracked.per_rank:
            more, per_rank[name] = tracked_shards(f"{name}/rank-{group.rank:05d}", tracked.thing, (0, 1))
        else:
            more, users[name] = tracked_shards(name, tracked.thing, (group.rank, group.size))
        shards += more
    document = {
        "progress": {**vars(progress)},
        "config": parts.config.to_dict(),
        "folder": str(parts.config.folder),
        "optim": {name: optimizer_document(prepared) for name, prepared in parts.prepared.items()},
        "user": users,
        "writer": {"strategy": parts.config.strategy.name, "mesh": vars(parts.world.mesh.sizes)},
    }
    return shards, per_rank, deepcopy(document)


def _parameters(prepared: Mapping[str, Prepared]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter of the prepared models and objectives, with its stored name."""
    for one in prepared.values():
        for kind, module in (("model", one.model), ("objective", one.objective)):
            for name, parameter in module.named_parameters() if module is not None else ():
                yield f"{kind}/{one.name}/{name}", parameter


def _trained(prepared: Mapping[str, Prepared]) -> set[str]:
    return {name for name, parameter in _parameters(prepared) if parameter.requires_grad}


def frozen_names(prepared: Mapping[str, Prepared]) -> set[str]:
    """Return the stored names of parameters that were never trained.

    A parameter that a script froze during the run is not among them: it holds what it learned until then.
    """
    trained = {id(named.parameter) for one in prepared.values() for named in one.named}
    return {name for name, parameter in _parameters(prepared) if id(parameter) not in trained}
