"""The folder of a run's checkpoints: which there are, which to resume from, which to let go.

A folder without a complete manifest is not a checkpoint. There is no pointer to the latest that could go stale: the
names are the list. Removing and setting aside are one rename first, so that a kill leaves no half checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from disttrain.checkpoint.disk import Disk
from disttrain.checkpoint.manifest import MANIFEST
from disttrain.checkpoint.reader import Checkpoint
from disttrain.checkpoint.shards import Ranks, take_step
from disttrain.errors import CheckpointError, explain
from disttrain.logs import room_logger

STAGING = ".tmp-"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    if step < 0:
        raise ValueError(f"a step is not negative: {step}")
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, by step, oldest first; whether they are whole is not looked at. Local."""
    return [path for path in _step_folders(root) if (path / MANIFEST).is_file()]


def _step_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_whole(root: Path, ranks: Ranks, verify: bool = True) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that every rank can read, and the newer ones rejected with the reason. Collective.

    Rank 0 lists; all ranks open. With `verify` every byte is read once, each rank reading its part.
    """
    candidates = take_step(ranks, lambda: None, lambda _: _step_folders(root)[::-1], asked=f"{root} cannot be listed.")
    rejected: list[tuple[Path, str]] = []
    for path in candidates:
        opened: list[Checkpoint] = []

        def inspect(path: Path = path, opened: list[Checkpoint] = opened) -> None:
            opened.append(_open_own_step(path, verify=verify))
            faults = opened[0].faults((ranks.rank, ranks.size)) if verify else []
            if faults:
                raise CheckpointError("; ".join(faults[:5]))

        try:
            take_step(ranks, inspect, lambda _: None, asked=f"{path.name} was rejected:")
        except CheckpointError as error:
            rejected.append((path, str(error)))
        else:
            return opened[0], rejected
    return None, rejected


def _open_own_step(path: Path, *, verify: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(path, verify=verify)
    if path.name != step_folder(checkpoint.step):
        raise CheckpointError(
            explain(f"{path} holds another step's checkpoint.", f"step {checkpoint.step}", "rename it back")
        )
    return checkpoint


def prune(root: Path, keep_last: int, protect: Collection[Path] = (), *, disk: Disk | None = None) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints and those in `protect`; returns the removed. Local: rank 0.

    A checkpoint whose manifest or files' sizes are wrong is neither counted nor removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is at least 1, not {keep_last}")
    whole = []
    for path in list_checkpoints(root):
        try:
            _open_own_step(path, verify=False)
        except CheckpointError as error:
            room_logger("checkpoint").warning("%s is neither counted nor removed: %s", path, error)
        else:
            whole.append(path)
    kept = {path.resolve() for path in protect}
    gone = [path for path in whole[:-keep_last] if path.resolve() not in kept]
    disk = disk or Disk()
    doomed = [path.with_name(f"{STAGING}pruned-{path.name}") for path in gone]
    for path, new in zip(gone, doomed, strict=True):
        disk.remove_tree(new)
        disk.rename(path, new)
    if gone:
        disk.sync_folder(root)  # else a power cut may give the old name back to what is half removed
    for path in doomed:
        disk.remove_tree(path)
    return gone


def set_aside(path: Path, *, disk: Disk | None = None) -> Path:
    """Rename a rejected checkpoint, so that its step can be saved again; the new path. Local: rank 0."""
    disk = disk or Disk()
    for number in range(1, 10_000):
        aside = path.with_name(f"rejected-{path.name}-{number}")
        if not aside.exists():
            disk.rename(path, aside)
            disk.sync_folder(path.parent)
            return aside
    raise CheckpointError(explain(f"{path} cannot be set aside.", "9999 earlier ones", "remove rejected-* there"))


def remove_stale_staging(root: Path, *, disk: Disk | None = None) -> list[Path]:
    """Remove what killed writers left behind; returns it. Local: rank 0, when nobody saves."""
    stale = sorted(path for path in root.iterdir() if path.name.startswith(STAGING)) if root.is_dir() else []
    for path in stale:
        (disk or Disk()).remove_tree(path)
    return stale
