"""What a path means to whoever wants weights: a run, one of its checkpoints, or what another library saved."""

from __future__ import annotations

from disttrain.checkpoint import Address, Checkpoint, Place, SoleRank, newest_whole, place_of, storage_of
from disttrain.checkpoint.formats import NativeWeights, Weights, format_of, open_weights
from disttrain.engine.places import checkpoints_in
from disttrain.errors import CheckpointError, explain


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


def kind_of(path: str | Place) -> str:
    """The format of what is at `path`; a run and an address are of `disttrain`. Local; raises CheckpointError."""
    place = place_of(path)
    if isinstance(place, Address) or checkpoints_in(place) is not None:
        return "disttrain"
    return format_of(place)


def open_any(path: str | Place, name: str) -> Weights:
    """The weights of one model at `path`, whatever its format. Local; raises CheckpointError."""
    place = place_of(path)
    if isinstance(place, Address) or not place.exists() or kind_of(place) == "disttrain":
        checkpoint = open_newest(place)
        refuse_unknown(checkpoint, name)
        return NativeWeights(checkpoint, name)
    return open_weights(place, name)


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
