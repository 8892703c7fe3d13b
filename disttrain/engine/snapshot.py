"""A run's checkpoints: what of the engine's parts goes into one, and how they come back out.

All functions are collective. Raises CheckpointError on every rank where one rank cannot write or read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.checkpoint import Checkpoint, Differences, Place, PlaceT, PlanMemory, Ranks, Shard, save_checkpoint
from disttrain.checkpoint.formats import Rename, load_weights_into
from disttrain.config import Config
from disttrain.engine.base import Base, base_of, refuse_other_base
from disttrain.engine.buffers import share_buffers
from disttrain.engine.opening import open_any_same, refuse_unknown
from disttrain.engine.random_state import random_shards, restore_random
from disttrain.engine.state import (
    optimizer_document,
    refuse_another_run,
    restore_optimizer,
    restore_tracked,
    tracked_shards,
    tracked_tensor_names,
)
from disttrain.errors import CheckpointError, TrainingError, explain
from disttrain.logs import room_logger
from disttrain.strategy import AbstractStrategy, Prepared, World

_log = room_logger("checkpoint")

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
        frozen = _frozen(parts.prepared)
        left_out = [shard for shard in shards if shard.name in frozen]
        document["base"] = parts.base.fingerprints(left_out, group)
        shards = [shard for shard in shards if shard.name not in frozen]
    document["evaluation"] = dict(evaluation)
    return Snapshot(progress.steps, shards, document, frozenset(_trained(parts.prepared)))


def commit(snapshot: Snapshot, root: PlaceT, ranks: Ranks, plans: PlanMemory | None = None) -> PlaceT:
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


def _frozen(prepared: Mapping[str, Prepared]) -> set[str]:
    """Those that nothing has trained: one that a script froze on the way holds what was learnt until then."""
    trained = {id(named.parameter) for one in prepared.values() for named in one.named}
    return {name for name, parameter in _parameters(prepared) if id(parameter) not in trained}


def restore(parts: Parts, checkpoint: Checkpoint) -> Progress:
    """Put everything back into parts that are prepared already.

    Names, shapes, tracked objects and the chunks that this rank reads are judged before anything is written. Where it
    raises later (a schedule that cannot go on with other settings, a disk that fails meanwhile), the parts are not to
    be used: in a run, all ranks end.
    """
    if base_of(checkpoint):
        _check_base(parts, checkpoint)
    parts.world.group.together(lambda: _restore(parts, checkpoint), "loading the checkpoint")
    for prepared in parts.prepared.values():
        parts.strategy.loaded(prepared)
    return Progress(**checkpoint.document["progress"])


def _check_base(parts: Parts, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, on every rank, where the frozen parameters are not those that the checkpoint left out."""
    stored = base_of(checkpoint)

    def left_out() -> list[Shard]:
        every = [shard for prepared in parts.prepared.values() for shard in parts.strategy.shards(prepared)]
        return [shard for shard in every if shard.name in stored]

    group = parts.world.group
    found = parts.base.fingerprints(group.together(left_out, "checking the frozen parameters"), group)
    refuse_other_base(checkpoint, stored, found)


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
    states = {name: _state_of(checkpoint, name, one, parts.world.group.rank) for name, one in parts.tracked.items()}
    shards: list[Shard] = []
    for prepared in parts.prepared.values():
        shards += parts.strategy.shards(prepared, checkpoint.tensors)
    shards = [shard for shard in shards if shard.name not in base_of(checkpoint)]
    checkpoint.load_into(shards, ignore={name for name in checkpoint.tensors if name.startswith("user/")})
    now, then = parts.config.to_dict(), document["config"]
    same = "imported" not in document and all(now.get(key) == then.get(key) for key in ("optim", "schedule"))
    for name, prepared in parts.prepared.items():
        restore_optimizer(prepared, document["optim"][name], same_settings=same)
    for name, saved in states.items():
        if saved is not None:
            tensors = {key: checkpoint.read(key) for key in tracked_tensor_names(saved)}
            restore_tracked(parts.tracked[name].thing, saved, tensors)
    restore_random(checkpoint, parts.world.group.rank, parts.world.device)


def _state_of(checkpoint: Checkpoint, name: str, tracked: Tracked, rank: int) -> Any:
    """The saved state of a tracked object; None for a rank that has none of its own: it keeps what it has. Local."""
    users = checkpoint.document["user"]
    saved = users.get(name)
    if saved is None:
        raise CheckpointError(
            explain(
                f"{checkpoint.path} is to give {name!r} its state back.",
                f"tracked objects {', '.join(users) or 'none'}",
                "track what was tracked when it was saved",
            )
        )
    per_rank = isinstance(saved, Mapping) and set(saved) == {RANKS}
    if per_rank != tracked.per_rank:
        found, do = ("a state of each rank", "with") if per_rank else ("one state for the whole world", "without")
        raise CheckpointError(
            explain(f"{checkpoint.path} is to give {name!r} its state back.", found, f"track it {do} per_rank=True")
        )
    if not per_rank:
        return saved
    states = saved[RANKS]
    if rank >= len(states):
        _log.warning("rank %d: the checkpoint has %r of %d ranks; it keeps its own", rank, name, len(states))
        return None
    return states[rank]


def others_than(checkpoint: Checkpoint, name: str) -> set[str]:
    """Every stored tensor that is no weight of the model of that name. Pure."""
    return {stored for stored in checkpoint.tensors if not stored.startswith(f"model/{name}/")}


def load_weights(
    parts: Parts, name: str, path: str | Place, *, strict: bool, only: Sequence[str], rename: Rename | None
) -> Differences:
    """Only the model's own tensors, from any format that `open_weights` knows; each rank reads its boxes."""
    prepared = parts.prepared[name]
    weights = open_any_same(path, name, parts.world.group)

    def fill() -> Differences:
        shards = [shard for shard in parts.strategy.shards(prepared) if shard.name.startswith(f"model/{name}/")]
        return load_weights_into(
            weights,
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


def _load(parts: Parts, name: str, checkpoint: Checkpoint, wanted: Callable[[Shard], bool]) -> None:
    prepared = parts.prepared[name]

    def fill() -> None:
        shards = [shard for shard in parts.strategy.shards(prepared) if wanted(shard)]
        checkpoint.load_into(shards, ignore=others_than(checkpoint, name) - {shard.name for shard in shards})

    parts.world.group.together(fill, "loading weights")
    parts.strategy.loaded(prepared)
