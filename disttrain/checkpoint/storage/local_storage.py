"""Stores checkpoints on a disk, local or shared by all nodes.

Files are written into a staging folder and synced. One rename commits the checkpoint. Writes and renames use `Disk`.
Links and anything but regular files are rejected.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from disttrain.checkpoint.form.manifest import MANIFEST, FileInfo
from disttrain.checkpoint.storage.chunk_reader import ChunkReader
from disttrain.checkpoint.storage.durable_files import Disk, DiskFile, free_bytes
from disttrain.checkpoint.storage.rejections import describe_foreign_folder, not_a_checkpoint
from disttrain.errors import CheckpointError, DamagedError, UnreadableError

STAGING = ".tmp-"

_PIECE_BYTES = 512 * 2**10
"""Bytes read from a disk at once and added to the checksum while they are still in the processor's second-level cache.

The checksum of a piece then costs a fifth of reading it. After a read of 16 MiB it costs as much as the read itself.
"""


class LocalStorage:
    """Implements `Storage` for paths."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    # ------------------------------------------------------------------ listing

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def taken(self, path: Path) -> bool:
        return os.path.lexists(path)

    def size(self, path: Path) -> int | None:
        return path.stat().st_size if path.is_file() else None

    def bytes_at(self, path: Path) -> int:
        below = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        size = 0
        for file in [path, *below]:
            with suppress(FileNotFoundError):  # a run in progress renames and removes files
                found = file.lstat()
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
        return size

    def written_at(self, path: Path) -> datetime | None:
        try:
            return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        except OSError:
            return None

    # ------------------------------------------------------------------ reading

    def read_manifest(self, folder: Path) -> bytes:
        try:
            if not folder.is_dir():
                raise not_a_checkpoint(folder, "a file" if folder.exists() else "no such folder")
            names = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise _read_error(folder, error) from error
        if MANIFEST not in names:
            raise not_a_checkpoint(folder, describe_foreign_folder(names))
        with open(_open_regular(folder / MANIFEST, None), "rb") as file:
            return file.read()

    def unusable(self, folder: Path, files: Mapping[str, FileInfo]) -> Iterator[tuple[str, CheckpointError]]:
        for name, info in files.items():
            try:
                os.close(_open_regular(folder / name, info.size))
            except CheckpointError as error:
                yield name, error

    @contextmanager
    def open_chunks(self, path: Path, info: FileInfo, chunk_bytes: int) -> Iterator[ChunkReader]:
        descriptor = _open_regular(path, info.size)
        try:
            yield ChunkReader(
                lambda view, at: os.preadv(descriptor, [view], at), path.name, info, chunk_bytes, _PIECE_BYTES
            )
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------ writing one checkpoint

    def begin(self, target: Path) -> Path:
        staging = target.with_name(f"{STAGING}{target.name}-{secrets.token_hex(4)}")
        self._disk.make_folder(staging)
        return staging

    def create(self, path: Path, size: int) -> DiskFile:
        return self._disk.create(path, size)

    def sync_folder(self, folder: Path) -> None:
        self._disk.sync_folder(folder)

    def commit(self, staging: Path, target: Path) -> None:
        self._disk.rename(staging, target)
        self._disk.sync_folder(target.parent)

    def discard(self, staging: Path) -> None:
        self._disk.remove_tree(staging)

    def free_bytes(self, folder: Path) -> int:
        return free_bytes(folder)

    # ------------------------------------------------------------------ retention

    def reject_unwritable(self, root: Path) -> None:
        return  # the run has already written to its folder, and the first save reports what a disk rejects

    def unfinished(self, root: Path) -> list[Path]:
        return [root / name for name in self.names(root) if name.startswith(STAGING)]

    def remove(self, paths: Sequence[Path]) -> None:
        doomed = [(path, path.with_name(f"{STAGING}pruned-{path.name}")) for path in paths if not _is_staging(path)]
        for path, renamed in doomed:
            self._disk.remove_tree(renamed)
            self._disk.rename(path, renamed)
        for root in {path.parent for path, _ in doomed}:
            # Otherwise a power cut could restore the old name of a folder that is only partly removed.
            self._disk.sync_folder(root)
        for path in [*(renamed for _, renamed in doomed), *filter(_is_staging, paths)]:
            self._disk.remove_tree(path)

    def move(self, path: Path, target: Path) -> None:
        self._disk.rename(path, target)
        self._disk.sync_folder(target.parent)


def _is_staging(path: Path) -> bool:
    return path.name.startswith(STAGING)


def _open_regular(path: Path, size: int | None) -> int:
    """Return the descriptor of a regular file of that size. Raises DamagedError or UnreadableError."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise not_a_checkpoint(path, "a link" if stat.S_ISLNK(mode) else "not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _read_error(path, error) from error
    actual = os.fstat(descriptor).st_size
    if size is not None and actual != size:
        os.close(descriptor)
        raise not_a_checkpoint(path, f"{actual} bytes instead of {size}")
    return descriptor


def _read_error(path: Path, error: OSError) -> DamagedError | UnreadableError:
    damaged = not_a_checkpoint(path, str(error.strerror))
    return UnreadableError(str(damaged)) if isinstance(error, PermissionError) else damaged
