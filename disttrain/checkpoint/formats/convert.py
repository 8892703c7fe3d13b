"""Converts weights and checkpoints from one format to another.

The result is written under a temporary name, synced and renamed. An existing name is never overwritten.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disttrain.checkpoint.form.shards import Shard, full_shard
from disttrain.checkpoint.formats.detect import carries_state, open_weights, read_state
from disttrain.checkpoint.formats.foreign_state import ForeignState
from disttrain.checkpoint.formats.huggingface import SHARD_BYTES, write_folder, write_safetensors
from disttrain.checkpoint.formats.restricted_pickle import reject_corrupt_zip
from disttrain.checkpoint.formats.torch_file import TorchWeights, write_torch
from disttrain.checkpoint.formats.weights import Weights
from disttrain.checkpoint.ranks import SoleRank
from disttrain.checkpoint.storage.durable_files import Disk
from disttrain.checkpoint.storage.local_storage import STAGING
from disttrain.checkpoint.write.save import save_checkpoint
from disttrain.errors import CheckpointError, explain

EXPORTS = ("huggingface", "safetensors", "torch")


@dataclass(frozen=True)
class Extras:
    """Data of the model only: the texts of a Hugging Face folder by file name, and other names of tied weights."""

    texts: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversionResult:
    """The written path, its number of tensors, and descriptions of the content that was left out."""

    path: Path
    tensors: int
    left_out: tuple[str, ...] = ()


def export_weights(
    weights: Weights,
    target: Path,
    to: str,
    *,
    extras: Extras | None = None,
    disk: Disk | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionResult:
    """Write a model's weights in the format `to`, one of EXPORTS. Local.

    One tensor at a time is in memory. Raises CheckpointError.
    """
    disk, extras = disk or Disk(), extras or Extras()

    def write(staging: Path) -> None:
        if to == "huggingface":
            disk.make_folder(staging)
            write_folder(weights, staging, disk, extra=extras.texts, shard_bytes=shard_bytes)
        elif to == "safetensors":
            write_safetensors(weights, list(weights.tensors), staging, disk)
        else:
            write_torch(weights, staging, extras.aliases)

    _staged(target, disk, write)
    return ConversionResult(target, len(weights.tensors))


def import_checkpoint(
    source: Path, target: Path, *, owner: str = "model", disk: Disk | None = None
) -> ConversionResult:
    """Convert `source` to a disttrain checkpoint at `target`, under the name `owner`. Local.

    Optimizer state is included if the source stores it by name. Otherwise, only weights are. Tensors remain in the
    source's mapped files until they are written. Raises CheckpointError.
    """
    disk = disk or Disk()
    state = read_state(source, owner) if carries_state(source) else _of_weights(source, owner)
    document = _document(state, owner)

    def write(staging: Path) -> None:
        root = staging.with_name(f"{staging.name}-import")
        try:
            disk.rename(save_checkpoint(root, state.steps, state.shards, document, SoleRank(), disk=disk), staging)
        finally:
            disk.remove_tree(root)

    _staged(target, disk, write)
    ties = [f"{alias} is another name of {name}" for alias, name in state.ties.items()]
    return ConversionResult(target, len({shard.name for shard in state.shards}), (*ties, *state.left_out))


def _of_weights(source: Path, owner: str) -> ForeignState:
    weights = open_weights(source, owner)
    for file in [source] if source.is_file() else sorted(source.glob("*.bin")):
        reject_corrupt_zip(file)
    ties = weights.ties() if isinstance(weights, TorchWeights) else {}
    shards: list[Shard] = [
        full_shard(f"model/{owner}/{name}", weights.full_tensor(name)) for name in weights.tensors if name not in ties
    ]
    return ForeignState(source, "weights", tuple(shards), ties=ties)


def _document(state: ForeignState, owner: str) -> dict[str, Any]:
    """Return the document that the engine reads from a checkpoint.

    It has no config. The caller that loads the checkpoint provides the model and all settings.
    """
    schedule = {"last_epoch": state.steps, "_step_count": state.steps + 1}
    optimizer: dict[str, Any] = {
        "updates": state.steps,
        "optimizer": f"that of {state.kind}",
        "groups": [],
        "schedule": schedule,
    }
    trained = any(shard.name.startswith("optim/") for shard in state.shards)
    return {
        "progress": {"steps": state.steps, "samples": state.samples, "tokens": 0, "skipped": 0, "positions": {}},
        "config": {},
        "imported": {"from": state.kind, "path": str(state.path), "left_out": list(state.left_out)},
        "optim": {owner: optimizer} if trained else {},
        "user": {},
        "writer": {"strategy": state.kind, "mesh": {}},
    }


def _staged(target: Path, disk: Disk, write: Callable[[Path], None]) -> None:
    """Call `write(path)` to make a file or folder next to `target`, then rename it to `target`.

    `write` must sync its output. Nothing else remains.
    """
    if os.path.lexists(target):
        raise CheckpointError(
            explain(f"Cannot write {target}.", "it exists already, and nothing is overwritten", "name another target")
        )
    staging = target.with_name(f"{STAGING}{target.name}-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(staging)
        disk.rename(staging, target)
        disk.sync_folder(target.parent)
    except OSError as error:
        problem = f"{error.strerror or error} ({error.filename or staging})"
        raise CheckpointError(
            explain(f"Cannot write {target}.", problem, "free disk space, or write elsewhere")
        ) from error
    finally:
        if staging.is_dir():
            disk.remove_tree(staging)
        else:
            staging.unlink(missing_ok=True)
