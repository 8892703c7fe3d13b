"""Decides whether a run's folder or a checkpoint holds the same run as a config.

Rejects a folder that holds another run, with every difference by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disttrain.errors import CheckpointError, explain

IDENTITY = (
    "run.seed",
    "model.target",
    "model.args",
    "objective.target",
    "objective.args",
    "data.train",
    "data.collate",
    "data.global_batch",
    "data.shuffle",
    "data.last",
    "optim.target",
)
"""The config keys that identify a run. All other keys may differ when the run continues."""

UNTRAINED = ("run.name", "run.dir", "run.device", "run.threads", "run.timeout_s", "report", "checkpoint", "version")
"""Keys without an effect on what was trained."""


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identifying part of a resolved config, by dotted key. Pure."""
    found: dict[str, Any] = {}
    for key in IDENTITY:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[key] = value
    if isinstance(config.get("optim"), list):
        found["optim.target"] = [{key: one[key] for key in ("match", "target")} for one in config["optim"]]
    return found


def reject_another_run(folder: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise CheckpointError with every difference between the run in a folder and the requested run. Pure."""
    before, now = identity_of(theirs), identity_of(mine)
    differing = [key for key in IDENTITY if before[key] != now[key]]
    if not differing:
        return
    lines = "".join(f"\n    {key}: {before[key]!r} there, {now[key]!r} requested" for key in differing)
    raise CheckpointError(
        explain(
            f"Cannot continue the run in {folder}.",
            f"it holds another run:{lines}",
            "set another run.name, or the values it was started with; to start from its weights, "
            "set another run.name and model.weights",
        )
    )


def changed_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Return `key: before there, now requested` for each setting that differs and affects training. Pure."""
    before, now = _leaves(theirs), _leaves(mine)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    shown = [key for key in keys if not any(key == one or key.startswith(f"{one}.") for one in UNTRAINED)]
    return [f"{key}: {before.get(key)!r} there, {now.get(key)!r} requested" for key in shown]


def _leaves(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
