"""Where a run's checkpoints lie: in its folder, or in `checkpoint.storage`. The one place that says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

from disttrain.checkpoint import Address, Location, address_fault, holds_checkpoints, parse_location
from disttrain.config import Config, parse_value
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.report import RunFolder


def checkpoints_of(config: Config) -> Location:
    """The folder of the run's checkpoints. Touches neither disk nor network; ConfigError for an unusable storage."""
    storage = config.checkpoint.storage
    if storage is None:
        return RunFolder(Path(config.run.dir) / config.run.name).checkpoints
    place = parse_location(storage)
    fault = address_fault(place) if isinstance(place, Address) else _path_fault(storage)
    if fault:
        raise ConfigError(explain(f"checkpoint.storage={storage} is to hold the run's checkpoints.", *fault))
    return place / config.run.name


def _path_fault(storage: str) -> tuple[str, str] | None:
    protocol, colon, rest = storage.partition(":")
    if colon and rest.startswith("/") and "/" not in protocol:
        return "a path that begins like an address", f"write {protocol}://{rest.lstrip('/')}"
    return None if storage else ("an empty name", "name an address or a folder, or take the line out")


def checkpoints_in(place: Location) -> Location | None:
    """The folder of checkpoints that belongs to the run at `place`; None where no run is there."""
    if isinstance(place, Address):
        return place if holds_checkpoints(place) else None
    folder = RunFolder(place)
    if folder.checkpoints.is_dir():
        return folder.checkpoints
    try:
        config = parse_value(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):  # no run's folder: what it is, its reader will say
        return None
    if not isinstance(config, Mapping):
        return None
    storage, name = _text_in(config, "checkpoint", "storage"), _text_in(config, "run", "name")
    return parse_location(storage) / name if storage and name else None


def refuse_moved(folder: RunFolder, theirs: Mapping[str, Any], config: Config) -> None:
    """Raise CheckpointError where `theirs`, the config found in the folder, keeps checkpoints elsewhere.

    The run would find none, and begin anew over what the folder tells of it.
    """
    before, now = _text_in(theirs, "checkpoint", "storage"), config.checkpoint.storage
    if before != now:
        raise CheckpointError(
            explain(
                f"{folder.path} is to be continued with checkpoints in {now or 'it'}.",
                f"it has them in {before or folder.checkpoints}",
                f"set checkpoint.storage={before or 'null'}; or copy them there and say so in {folder.config} too",
            )
        )


def _text_in(config: Mapping[str, Any], section: str, key: str) -> str | None:
    """What a config found somewhere says there, be it whose it may."""
    held = config.get(section)
    found = held.get(key) if isinstance(held, Mapping) else None
    return found if isinstance(found, str) else None
