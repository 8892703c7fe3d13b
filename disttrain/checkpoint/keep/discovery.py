"""Lists the checkpoints of a run, opens the newest intact one, and removes or renames checkpoints.

A folder without a complete manifest is not a checkpoint. No pointer to the latest checkpoint exists, because it could
be outdated: the folder names are the list. A process that is killed during a removal or a rename leaves no partial
checkpoint.
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
from disttrain.checkpoint.storage.location import Location, LocationT, child, sibling, step_folder, step_of
from disttrain.errors import CheckpointError, UnreadableError, explain
from disttrain.logs import package_logger


def list_checkpoints(root: LocationT) -> list[LocationT]:
    """Return the committed checkpoints by step, oldest first, without checking them. Local."""
    storage = storage_of(root)
    return [path for path in _step_folders(root) if storage.size(child(path, MANIFEST)) is not None]


def _step_folders(root: LocationT) -> list[LocationT]:
    found = [(step, child(root, name)) for name in storage_of(root).names(root) if (step := step_of(name)) is not None]
    return [path for _, path in sorted(found)]


def _candidates(root: LocationT) -> list[LocationT]:
    """Return the folders that may be checkpoints, newest first, without those left by killed writers."""
    unfinished = set(storage_of(root).unfinished(root))
    return [path for path in reversed(_step_folders(root)) if path not in unfinished]


def newest_intact(
    root: LocationT, ranks: Ranks, fill: Callable[[Checkpoint], None] | None = None
) -> tuple[Checkpoint | None, list[tuple[LocationT, str]]]:
    """Open the newest checkpoint that every rank can read. Collective.

    Returns the checkpoint, or None, and the newer ones that were rejected, each with the reason. Rank 0 lists the
    folder and all ranks open the candidates. Every byte is read and verified by at least one rank.

    All ranks call `fill` together. It first reads what the rank needs of a candidate, once
    (`Checkpoint.verify_while_loading`). The tensors that it fills are not valid before this function returns. An error
    of `fill` rejects the candidate, so `fill` must not raise errors that an older checkpoint would not avoid.

    Raises UnreadableError for a checkpoint that may be intact but that a rank cannot read, because its format is newer
    or a permission is missing.
    """
    candidates = run_collectively(ranks, lambda: None, lambda _: _candidates(root), failed=f"Cannot list {root}.")
    rejected: list[tuple[LocationT, str]] = []
    for path in candidates:
        try:
            return _open_intact(path, ranks, fill), rejected
        except UnreadableError:
            raise
        except CheckpointError as error:
            rejected.append((path, str(error)))
    return None, rejected


def _open_intact(path: Location, ranks: Ranks, fill: Callable[[Checkpoint], None] | None) -> Checkpoint:
    """Open a checkpoint and verify every byte. If a byte is wrong, every rank raises CheckpointError. Collective."""
    opened: list[Checkpoint] = []

    def read() -> list[ChunkRange]:
        checkpoint = opened[0]
        checkpoint.verify_while_loading()
        if fill is not None:
            fill(checkpoint)
        return checkpoint.checked

    def share(everyones: list[list[ChunkRange]]) -> list[list[ChunkRange]]:
        return divide_unread(opened[0].manifest.files, everyones, ranks.size)

    _read_collectively(path, ranks, lambda: opened.append(_open_matching(path, verify=True)), lambda _: None)
    shares = _read_collectively(path, ranks, read, share)
    _read_collectively(path, ranks, lambda: opened[0].verify(shares[ranks.rank]), lambda _: None)
    return opened[0]


def _read_collectively(
    path: Location, ranks: Ranks, act: Callable[[], Local], judge: Callable[[list[Local]], Agreed]
) -> Agreed:
    """Call `run_collectively`, but raise UnreadableError on every rank if `act` raised it on any rank."""

    def attempt() -> tuple[Local | None, str | None]:
        try:
            return act(), None
        except UnreadableError as error:
            return None, str(error)

    def decide(everyones: list[tuple[Any, str | None]]) -> tuple[Agreed | None, str | None]:
        unreadable = next((text for _, text in everyones if text is not None), None)
        return None if unreadable else judge([value for value, _ in everyones]), unreadable

    agreed, unreadable = run_collectively(ranks, attempt, decide, failed=f"{path.name} was rejected.")
    if unreadable is not None:
        raise UnreadableError(unreadable)
    return agreed  # type: ignore[return-value]


def _open_matching(path: Location, *, verify: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(path, verify=verify)
    if path.name != step_folder(checkpoint.step):
        raise CheckpointError(
            explain(f"{path} has the wrong name.", f"it contains step {checkpoint.step}", "rename it back")
        )
    return checkpoint


def holds_checkpoints(root: Location) -> bool:
    """Return whether a folder contains checkpoint folders, finished or not, and is not a checkpoint itself. Local."""
    names = storage_of(root).names(root)
    return MANIFEST not in names and any(step_of(name) is not None for name in names)


def reject_unwritable(root: Location) -> None:
    """Raise CheckpointError if an address cannot be written. A disk is not tested. Local: rank 0."""
    storage_of(root).reject_unwritable(root)


def prune(
    root: LocationT, keep_last: int, protect: Collection[Location] = (), *, disk: Disk | None = None
) -> list[LocationT]:
    """Remove all checkpoints except the newest `keep_last` and those in `protect`. Local: rank 0.

    Returns the removed checkpoints. A checkpoint whose manifest or file sizes are wrong is neither counted nor removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    intact = []
    for path in list_checkpoints(root):
        try:
            _open_matching(path, verify=False)
        except CheckpointError as error:
            package_logger("checkpoint").warning("%s is neither counted nor removed. %s", path, error)
        else:
            intact.append(path)
    kept = {path.resolve() for path in protect}
    gone = [path for path in intact[:-keep_last] if path.resolve() not in kept]
    storage_of(root, disk).remove(gone)
    return gone


def set_aside(path: LocationT, *, disk: Disk | None = None) -> LocationT:
    """Rename a rejected checkpoint, so that its step can be saved again. Return the new location. Local: rank 0."""
    storage = storage_of(path, disk)
    for number in range(1, 10_000):
        aside = sibling(path, f"rejected-{path.name}-{number}")
        if not storage.taken(aside):
            storage.move(path, aside)
            return aside
    raise CheckpointError(
        explain(f"Cannot rename {path}.", "9999 rejected checkpoints exist already", "remove rejected-* there")
    )


def remove_stale_staging(root: LocationT, *, disk: Disk | None = None) -> list[LocationT]:
    """Remove what killed writers left, and return it. Local: rank 0, while nobody saves."""
    storage = storage_of(root, disk)
    stale = storage.unfinished(root)
    storage.remove(stale)
    return stale
