"""A run's checkpoints: what of the engine's parts goes into one. How they come back out is `restoring`'s.

All functions are collective. Raises CheckpointError on every rank where one rank cannot write.
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
from disttrain.engine.checkpointing.documents import (
    optimizer_document,
    tracked_shards,
)
from disttrain.engine.checkpointing.frozen_parameters import Base
from disttrain.engine.checkpointing.random_state import random_shards
from disttrain.errors import TrainingError, explain
from disttrain.strategy import AbstractStrategy, Prepared, World
from disttrain.strategy.buffers import share_buffers

RANKS = "$ranks"
"""In the document: a tracked object's states, one a rank."""


@dataclass
class Progress:
    """Where a run stands, in numbers that no mesh changes; `positions` are those in the data, by the data's name."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tracked:
    """A user's object whose state goes along: one for the world, or each rank its own."""

    thing: Any
    per_rank: bool = False


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of."""

    config: Config
    world: World
    strategy: AbstractStrategy
    prepared: Mapping[str, Prepared]
    tracked: Mapping[str, Tracked] = field(default_factory=dict)
    base: Base = field(default_factory=Base)


@dataclass(frozen=True)
class Snapshot:
    """What a rank brings to the checkpoint of a step; `trained` names the tensors that are to be finite."""

    step: int
    shards: Sequence[Shard]
    document: Mapping[str, Any]
    trained: frozenset[str]


def take(parts: Parts, progress: Progress, evaluation: Mapping[str, float]) -> Snapshot:
    """This rank's part of the checkpoint of this step, by reference: a step would change it."""
    for prepared in parts.prepared.values():
        share_buffers(prepared)
    group = parts.world.group
    shards, own, document = group.together(lambda: _collect(parts, progress), "collecting the checkpoint")
    if own:
        everyones = group.gather_all(own)
        document["user"] |= {name: {RANKS: [states[name] for states in everyones]} for name in own}
    if parts.config.checkpoint.only == "trainable":
        frozen = frozen_names(parts.prepared)
        left_out = [shard for shard in shards if shard.name in frozen]
        document["base"] = parts.base.fingerprints(left_out, group)
        shards = [shard for shard in shards if shard.name not in frozen]
    document["evaluation"] = dict(evaluation)
    return Snapshot(progress.steps, shards, document, frozenset(_trained(parts.prepared)))


def commit(snapshot: Snapshot, root: LocationT, ranks: Ranks, plans: PlanCache | None = None) -> LocationT:
    """Write a snapshot as a checkpoint; returns its folder. Collective over `ranks`; any thread may do it.

    Raises TrainingError on every rank where weights are not finite: such a checkpoint would end every resume.
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
                "The weights that are saved are to be finite.",
                f"{first} is not; nothing was saved",
                "go on from the checkpoint before: lower the learning rate, clip gradients (optim.clip_norm), "
                "or set report.every=1, which looks at every step's gradient before it is applied",
            )
        )
    return save_checkpoint(root, snapshot.step, snapshot.shards, snapshot.document, ranks, plans=plans)


def _is_finite(tensor: Tensor) -> bool:
    """Whether every entry is. In one pass without a copy, which `isfinite` takes three of."""
    return not tensor.numel() or bool(torch.linalg.vector_norm(tensor.detach(), math.inf).isfinite())


def _collect(parts: Parts, progress: Progress) -> tuple[list[Shard], dict[str, Any], dict[str, Any]]:
    """What this rank brings, what of tracked state is its own, and the document. Local."""
    group = parts.world.group
    shards = random_shards(group.rank, group.size, parts.world.device)
    own: dict[str, Any] = {}
    users: dict[str, Any] = {}
    for prepared in parts.prepared.values():
        shards += parts.strategy.shards(prepared)
    for name, tracked in parts.tracked.items():
        if tracked.per_rank:
            more, own[name] = tracked_shards(f"{name}/rank-{group.rank:05d}", tracked.thing, (0, 1))
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
    return shards, own, deepcopy(document)


def _parameters(prepared: Mapping[str, Prepared]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the prepared models and objectives, under its stored name."""
    for one in prepared.values():
        for kind, module in (("model", one.model), ("objective", one.objective)):
            for name, parameter in module.named_parameters() if module is not None else ():
                yield f"{kind}/{one.name}/{name}", parameter


def _trained(prepared: Mapping[str, Prepared]) -> set[str]:
    return {name for name, parameter in _parameters(prepared) if parameter.requires_grad}


def frozen_names(prepared: Mapping[str, Prepared]) -> set[str]:
    """Stored names of what nothing has trained: one that a script froze on the way holds what was learnt until then."""
    trained = {id(named.parameter) for one in prepared.values() for named in one.named}
    return {name for name, parameter in _parameters(prepared) if id(parameter) not in trained}
