"""The folder of a run's checkpoints: which there are, which to resume from, which to let go.

A folder without a complete manifest is not a checkpoint. There is no pointer to the latest that could go stale: the
names are the list. However they are removed or set aside, a kill leaves no half checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from disttrain.checkpoint.form.manifest import MANIFEST
from disttrain.checkpoint.ranks import Agreed, Local, Ranks, run_collectively
from disttrain.checkpoint.read.chunk_ranges import ChunkRange, divide_unread
from disttrain.checkpoint.read.reader import Checkpoint
from disttrain.checkpoint.storage.durable_files import Disk
from disttrain.checkpoint.storage.interface import storage_of
from disttrain.checkpoint.storage.local_storage import STAGING
from disttrain.checkpoint.storage.location import Location, LocationT, child, sibling, step_folder, step_of
from disttrain.errors import CheckpointError, UnreadableError, explain
from disttrain.logs import package_logger


def list_checkpoints(root: LocationT) -> list[LocationT]:
    """Committed checkpoints, by step, oldest first; whether they are whole is not looked at. Local."""
    storage = storage_of(root)
    return [path for path in _step_folders(root) if storage.size(child(path, MANIFEST)) is not None]


def _step_folders(root: LocationT) -> list[LocationT]:
    found = [(step, child(root, name)) for name in storage_of(root).names(root) if (step := step_of(name)) is not None]
    return [path for _, path in sorted(found)]


def _candidates(root: LocationT) -> list[LocationT]:
    """What may be a checkpoint, newest first: not what a killed writer left."""
    unfinished = set(storage_of(root).unfinished(root))
    return [path for path in reversed(_step_folders(root)) if path not in unfinished]


def newest_intact(
    root: LocationT, ranks: Ranks, fill: Callable[[Checkpoint], None] | None = None
) -> tuple[Checkpoint | None, list[tuple[LocationT, str]]]:
    """The newest checkpoint that every rank can read, and the newer ones rejected with the reason. Collective.

    Rank 0 lists; all ranks open; every byte is read, each by at least one rank, and checked. With `fill`, which all
    ranks enter together, a rank reads what it needs of each candidate first, once (`Checkpoint.verify_while_loading`): what
    it fills holds no state before this returns. What `fill` raises rejects the candidate: for what an older one would
    not help it is to keep to itself. Raises UnreadableError for one that may be whole and that a rank cannot read: of a
    newer format, or without permission.
    """
    candidates = run_collectively(ranks, lambda: None, lambda _: _candidates(root), failed=f"{root} cannot be listed.")
    rejected: list[tuple[LocationT, str]] = []
    for path in candidates:
        try:
            return _open_whole(path, ranks, fill), rejected
        except UnreadableError:
            raise
        except CheckpointError as error:
            rejected.append((path, str(error)))
    return None, rejected


def _open_whole(path: Location, ranks: Ranks, fill: Callable[[Checkpoint], None] | None) -> Checkpoint:
    """The checkpoint, of which every byte was found right. CheckpointError on every rank if one was not."""
    opened: list[Checkpoint] = []

    def read() -> list[ChunkRange]:
        checkpoint = opened[0]
        checkpoint.verify_while_loading()
        if fill is not None:
            fill(checkpoint)
        return checkpoint.checked

    def share(everyones: list[list[ChunkRange]]) -> list[list[ChunkRange]]:
        return divide_unread(opened[0].manifest.files, everyones, ranks.size)

    _take_reading_step(path, ranks, lambda: opened.append(_open_own_step(path, verify=True)), lambda _: None)
    shares = _take_reading_step(path, ranks, read, share)
    _take_reading_step(path, ranks, lambda: opened[0].verify(shares[ranks.rank]), lambda _: None)
    return opened[0]


def _take_reading_step(
    path: Location, ranks: Ranks, act: Callable[[], Local], judge: Callable[[list[Local]], Agreed]
) -> Agreed:
    """`run_collectively`, and UnreadableError on every rank where one rank's act raised it."""

    def told() -> tuple[Local | None, str | None]:
        try:
            return act(), None
        except UnreadableError as error:
            return None, str(error)

    def decide(everyones: list[tuple[Any, str | None]]) -> tuple[Agreed | None, str | None]:
        unreadable = next((text for _, text in everyones if text is not None), None)
        return None if unreadable else judge([value for value, _ in everyones]), unreadable

    agreed, unreadable = run_collectively(ranks, told, decide, failed=f"{path.name} was rejected:")
    if unreadable is not None:
        raise UnreadableError(unreadable)
    return agreed  # type: ignore[return-value]


def _open_own_step(path: Location, *, verify: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(path, verify=verify)
    if path.name != step_folder(checkpoint.step):
        raise CheckpointError(
            explain(f"{path} holds another step's checkpoint.", f"step {checkpoint.step}", "rename it back")
        )
    return checkpoint


def holds_checkpoints(root: Location) -> bool:
    """Whether there are folders of checkpoints, finished or not, and it is not one itself. Local."""
    names = storage_of(root).names(root)
    return MANIFEST not in names and any(step_of(name) is not None for name in names)


def reject_unwritable(root: Location) -> None:
    """Raise CheckpointError where an address cannot be written to; a disk is not tried. Local: rank 0."""
    storage_of(root).reject_unwritable(root)


def prune(
    root: LocationT, keep_last: int, protect: Collection[Location] = (), *, disk: Disk | None = None
) -> list[LocationT]:
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
            package_logger("checkpoint").warning("%s is neither counted nor removed: %s", path, error)
        else:
            whole.append(path)
    kept = {path.resolve() for path in protect}
    gone = [path for path in whole[:-keep_last] if path.resolve() not in kept]
    storage_of(root, disk).remove(gone)
    return gone


def set_aside(path: LocationT, *, disk: Disk | None = None) -> LocationT:
    """Rename a rejected checkpoint, so that its step can be saved again; the new path. Local: rank 0."""
    storage = storage_of(path, disk)
    for number in range(1, 10_000):
        aside = sibling(path, f"rejected-{path.name}-{number}")
        if not storage.taken(aside):
            storage.move(path, aside)
            return aside
    raise CheckpointError(explain(f"{path} cannot be set aside.", "9999 earlier ones", "remove rejected-* there"))


def remove_stale_staging(root: LocationT, *, disk: Disk | None = None) -> list[LocationT]:
    """Remove what killed writers left behind; returns it. Local: rank 0, when nobody saves."""
    storage = storage_of(root, disk)
    stale = storage.unfinished(root)
    storage.remove(stale)
    return stale


__all__ = [
    "STAGING",
    "holds_checkpoints",
    "list_checkpoints",
    "newest_intact",
    "prune",
    "reject_unwritable",
    "remove_stale_staging",
    "set_aside",
    "step_folder",
]
