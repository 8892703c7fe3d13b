"""Locates checkpoints: where a run keeps them, and which checkpoint or weights a path from a user means.

A run keeps its checkpoints in its folder or in `checkpoint.storage`. A path may name a run, one of its checkpoints, or
weights that another library saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

from disttrain.checkpoint import (
    Address,
    Checkpoint,
    Location,
    Ranks,
    SoleRank,
    address_fault,
    holds_checkpoints,
    newest_intact,
    parse_location,
    storage_of,
)
from disttrain.checkpoint.formats import NativeWeights, Weights, format_of, open_weights
from disttrain.config import Config, parse_value
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.report import RunFolder
from disttrain.runtime import Group

# ---------------------------------------------------------------------- a run's checkpoints


def checkpoints_of(config: Config) -> Location:
    """Return the folder of the run's checkpoints. Local; touches neither disk nor network.

    Raises ConfigError for an unusable checkpoint.storage.
    """
    storage = config.checkpoint.storage
    if storage is None:
        return RunFolder(Path(config.run.dir) / config.run.name).checkpoints
    location = parse_location(storage)
    fault = address_fault(location) if isinstance(location, Address) else _path_fault(storage)
    if fault:
        raise ConfigError(explain(f"checkpoint.storage={storage} cannot hold the run's checkpoints.", *fault))
    return location / config.run.name


def _path_fault(storage: str) -> tuple[str, str] | None:
    protocol, colon, rest = storage.partition(":")
    if colon and rest.startswith("/") and "/" not in protocol:
        return "a path that looks like an address", f"write {protocol}://{rest.lstrip('/')}"
    return None if storage else ("an empty name", "name an address or a folder, or remove the line")


def checkpoints_in(location: Location) -> Location | None:
    """Return the folder of checkpoints of the run at `location`, None where no run is there. Local."""
    if isinstance(location, Address):
        return location if holds_checkpoints(location) else None
    folder = RunFolder(location)
    if folder.checkpoints.is_dir():
        return folder.checkpoints
    try:
        config = parse_value(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):  # not a run's folder: the reader of its format reports what it is
        return None
    if not isinstance(config, Mapping):
        return None
    storage, name = _text_in(config, "checkpoint", "storage"), _text_in(config, "run", "name")
    return parse_location(storage) / name if storage and name else None


def reject_moved_checkpoints(folder: RunFolder, theirs: Mapping[str, Any], config: Config) -> None:
    """Raise CheckpointError where `theirs`, the config in the folder, keeps its checkpoints elsewhere. Pure.

    Otherwise the run would find no checkpoint and restart from scratch, over what the folder reports of it.
    """
    before, now = _text_in(theirs, "checkpoint", "storage"), config.checkpoint.storage
    if before != now:
        raise CheckpointError(
            explain(
                f"Cannot continue the run in {folder.path} with checkpoints in {now or 'its folder'}.",
                f"it keeps them in {before or folder.checkpoints}",
                f"set checkpoint.storage={before or 'null'}; or copy them there and edit {folder.config} too",
            )
        )


def _text_in(config: Mapping[str, Any], section: str, key: str) -> str | None:
    """Return a text of a config that may be anybody's, None where it has no such text."""
    held = config.get(section)
    found = held.get(key) if isinstance(held, Mapping) else None
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------------- what a path means


def open_newest(path: str | Location) -> Checkpoint:
    """Open the checkpoint at `path`, or the newest intact checkpoint of the run in the folder `path`. Local.

    Raises CheckpointError where there is none, with the reason.
    """
    root = _root_of(parse_location(path))
    return Checkpoint.open(path) if root is None else _newest(path, root, SoleRank())


def open_newest_together(path: str | Location, group: Group) -> Checkpoint:
    """Open the same checkpoint as `open_newest` on every rank. Each rank reads its part to verify it. Collective.

    The run at `path` may be training, so ranks that looked alone could choose different checkpoints.
    """
    root = group.together(lambda: _root_of(parse_location(path)), f"opening {path}")
    if root is None:
        return group.together(lambda: Checkpoint.open(path), f"opening {path}")
    return _newest(path, root, group)


def _newest(path: str | Location, root: Location, ranks: Ranks) -> Checkpoint:
    found, rejected = newest_intact(root, ranks)
    if found is None:
        reasons = "; ".join(f"{one.name}: {reason}" for one, reason in rejected) or "it has no complete checkpoint"
        raise CheckpointError(explain(f"Cannot load {path}.", reasons, "train it first, or name another run"))
    return found


def _root_of(path: Location) -> Location | None:
    """Return the folder of checkpoints of the run at `path`, None where no run is there. Local."""
    if not storage_of(path).taken(path):
        raise CheckpointError(explain(f"Cannot load {path}.", "no such folder", "name a run's folder or a checkpoint"))
    return checkpoints_in(path)


def kind_of(path: str | Location) -> str:
    """Return the format of what is at `path`: `disttrain` for a run and for an address. Local.

    Raises CheckpointError for an unknown format.
    """
    location = parse_location(path)
    if isinstance(location, Address) or checkpoints_in(location) is not None:
        return "disttrain"
    return format_of(location)


def open_any(path: str | Location, name: str) -> Weights:
    """Open the weights of one model at `path`, in any known format. Local. Raises CheckpointError."""
    return _weights_of(open_newest(path), name) if _is_native(path) else open_weights(str(path), name)


def open_any_together(path: str | Location, name: str, group: Group) -> Weights:
    """Open the same weights as `open_any` on every rank. Collective."""
    if group.together(lambda: _is_native(path), f"opening {path}"):
        checkpoint = open_newest_together(path, group)
        return group.together(lambda: _weights_of(checkpoint, name), f"opening {path}")
    return group.together(lambda: open_weights(str(path), name), f"opening {path}")


def _is_native(path: str | Location) -> bool:
    location = parse_location(path)
    return isinstance(location, Address) or not location.exists() or kind_of(location) == "disttrain"


def _weights_of(checkpoint: Checkpoint, name: str) -> Weights:
    reject_unknown_model(checkpoint, name)
    return NativeWeights(checkpoint, name)


def reject_unknown_model(checkpoint: Checkpoint, name: str) -> None:
    """Raise CheckpointError where the checkpoint holds no prepared model of that name. Pure."""
    known = list(checkpoint.document.get("optim", ()))
    if known and name not in known:
        raise CheckpointError(
            explain(
                f"Cannot load the model {name!r} of {checkpoint.path}.",
                f"its models were prepared as {', '.join(known)}",
                f"name one of them: disttrain.load(path, name={known[0]!r})",
            )
        )
