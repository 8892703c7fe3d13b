"""Checkpoints on a disk, local or shared by all nodes: a staging folder, synced, and one rename as the commit.

Writes and renames through `Disk`, reads through `chunks`. Refuses links and whatever is no regular file.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path

from disttrain.checkpoint.form.manifest import FileInfo
from disttrain.checkpoint.read.chunks import ChunkReader, open_chunks, read_manifest_bytes, refuse_unusable
from disttrain.checkpoint.storage.disk import Disk, DiskFile, free_bytes
from disttrain.errors import CheckpointError

STAGING = ".tmp-"


class LocalStorage:
    """`Storage` over paths; see there."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

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
            with suppress(FileNotFoundError):  # a run that goes on renames and removes
                found = file.lstat()
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
        return size

    def written_at(self, path: Path) -> datetime | None:
        try:
            return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        except OSError:
            return None

    def read_manifest(self, folder: Path) -> bytes:
        return read_manifest_bytes(folder)

    def unusable(self, folder: Path, files: Mapping[str, FileInfo]) -> Iterator[tuple[str, CheckpointError]]:
        for name, info in files.items():
            try:
                refuse_unusable(folder / name, info)
            except CheckpointError as error:
                yield name, error

    def open_chunks(self, path: Path, info: FileInfo, chunk_bytes: int) -> AbstractContextManager[ChunkReader]:
        return open_chunks(path, info, chunk_bytes)

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

    def refuse_unwritable(self, root: Path) -> None:
        return  # the run's folder has been written to by then, and a first save names what a disk refuses

    def unfinished(self, root: Path) -> list[Path]:
        return [root / name for name in self.names(root) if name.startswith(STAGING)]

    def remove(self, paths: Sequence[Path]) -> None:
        doomed = [(path, path.with_name(f"{STAGING}pruned-{path.name}")) for path in paths if not _is_staging(path)]
        for path, renamed in doomed:
            self._disk.remove_tree(renamed)
            self._disk.rename(path, renamed)
        for root in {path.parent for path, _ in doomed}:
            self._disk.sync_folder(root)  # else a power cut may give the old name back to what is half removed
        for path in [*(renamed for _, renamed in doomed), *filter(_is_staging, paths)]:
            self._disk.remove_tree(path)

    def move(self, path: Path, target: Path) -> None:
        self._disk.rename(path, target)
        self._disk.sync_folder(target.parent)


def _is_staging(path: Path) -> bool:
    return path.name.startswith(STAGING)
