"""What a path means to whoever wants weights: a run, one of its checkpoints, or what another library saved."""

from __future__ import annotations

from disttrain.checkpoint import (
    Address,
    Checkpoint,
    Location,
    Ranks,
    SoleRank,
    newest_intact,
    parse_location,
    storage_of,
)
from disttrain.checkpoint.formats import NativeWeights, Weights, format_of, open_weights
from disttrain.engine.checkpointing.locate import checkpoints_in
from disttrain.errors import CheckpointError, explain
from disttrain.runtime import Group


def open_newest(path: str | Location) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run whose folder `path` is. Local.

    Raises CheckpointError where there is none, with what was found.
    """
    root = _root_of(parse_location(path))
    return Checkpoint.open(path) if root is None else _newest(path, root, SoleRank())


def open_same(path: str | Location, group: Group) -> Checkpoint:
    """Like `open_newest`, the same checkpoint on every rank, each of which reads its part to verify it. Collective.

    The run at `path` may be training: without asking, ranks could find different ones the newest.
    """
    root = group.together(lambda: _root_of(parse_location(path)), f"opening {path}")
    if root is None:
        return group.together(lambda: Checkpoint.open(path), f"opening {path}")
    return _newest(path, root, group)


def _newest(path: str | Location, root: Location, ranks: Ranks) -> Checkpoint:
    found, rejected = newest_intact(root, ranks)
    if found is None:
        reasons = "; ".join(f"{one.name}: {reason}" for one, reason in rejected) or "no committed checkpoint"
        raise CheckpointError(explain(f"{path} is to be loaded.", reasons, "train it first, or name another run"))
    return found


def _root_of(path: Location) -> Location | None:
    """The folder of checkpoints of the run at `path`; None where it is no run's. Local."""
    if not storage_of(path).taken(path):
        raise CheckpointError(
            explain(f"{path} is to be loaded.", "no such folder", "name a run's folder or a checkpoint")
        )
    return checkpoints_in(path)


def kind_of(path: str | Location) -> str:
    """The format of what is at `path`; a run and an address are of `disttrain`. Local; raises CheckpointError."""
    place = parse_location(path)
    if isinstance(place, Address) or checkpoints_in(place) is not None:
        return "disttrain"
    return format_of(place)


def open_any(path: str | Location, name: str) -> Weights:
    """The weights of one model at `path`, whatever its format. Local; raises CheckpointError."""
    return _weights_of(open_newest(path), name) if _is_ours(path) else open_weights(str(path), name)


def open_any_same(path: str | Location, name: str, group: Group) -> Weights:
    """Like `open_any`, the same weights on every rank. Collective."""
    if group.together(lambda: _is_ours(path), f"opening {path}"):
        checkpoint = open_same(path, group)
        return group.together(lambda: _weights_of(checkpoint, name), f"opening {path}")
    return group.together(lambda: open_weights(str(path), name), f"opening {path}")


def _is_ours(path: str | Location) -> bool:
    place = parse_location(path)
    return isinstance(place, Address) or not place.exists() or kind_of(place) == "disttrain"


def _weights_of(checkpoint: Checkpoint, name: str) -> Weights:
    refuse_unknown(checkpoint, name)
    return NativeWeights(checkpoint, name)


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
