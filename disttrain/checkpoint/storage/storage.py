"""What this room needs of where checkpoints lie, and who provides it for a place.

The commit is the storage's: a disk renames a finished folder, in a store the manifest appears last. Everywhere a folder
without a manifest is no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol, cast

from disttrain.checkpoint.form.manifest import FileInfo
from disttrain.checkpoint.read.chunks import ChunkReader
from disttrain.checkpoint.storage.address import Address, Place, PlaceT
from disttrain.checkpoint.storage.disk import Disk
from disttrain.checkpoint.storage.local import LocalStorage
from disttrain.checkpoint.storage.remote import RemoteStorage
from disttrain.errors import CheckpointError


class NewFile(Protocol):
    """A file being written. Left without `sync`, nothing of it counts."""

    def write(self, content: memoryview | bytes) -> None:
        """All of `content`, after what is there."""
        ...

    def sync(self) -> None:
        """Return when the content is durable; nothing is written after it."""
        ...


class Storage(Protocol[PlaceT]):
    """The operations, all local to the calling process.

    A store that cannot be reached raises CheckpointError; what a writer does, and all that a disk refuses, OSError with
    words and a path.
    """

    # ------------------------------------------------------------------ what is there

    def names(self, folder: PlaceT) -> list[str]:
        """What lies directly in a folder; nothing if it is not there."""
        ...

    def taken(self, path: PlaceT) -> bool:
        """Whether there is anything of that name."""
        ...

    def size(self, path: PlaceT) -> int | None:
        """A file's bytes; None where there is no such file."""
        ...

    def bytes_at(self, path: PlaceT) -> int:
        """Of a file, or of all files below a folder, as far as they are still there."""
        ...

    def written_at(self, path: PlaceT) -> datetime | None:
        """When a file was last written, as the storage has it; None where it is gone or nobody knows."""
        ...

    # ------------------------------------------------------------------ reading; CheckpointError says what is wrong

    def read_manifest(self, folder: PlaceT) -> bytes:
        """What the folder's manifest holds; an error that says what is there instead."""
        ...

    def unusable(self, folder: PlaceT, files: Mapping[str, FileInfo]) -> Iterator[tuple[str, CheckpointError]]:
        """Those of the files that are not there with their sizes, each with what is there instead."""
        ...

    def open_chunks(self, path: PlaceT, info: FileInfo, chunk_bytes: int) -> AbstractContextManager[ChunkReader]:
        """The file, to be read chunk by chunk."""
        ...

    # ------------------------------------------------------------------ writing one checkpoint

    def begin(self, target: PlaceT) -> PlaceT:
        """A fresh folder for the files of `target`, which is not a checkpoint before `commit`."""
        ...

    def create(self, path: PlaceT, size: int) -> AbstractContextManager[NewFile]:
        """A new file that will have `size` bytes."""
        ...

    def sync_folder(self, folder: PlaceT) -> None:
        """Return when the names in the folder are durable."""
        ...

    def commit(self, staging: PlaceT, target: PlaceT) -> None:
        """All files are written, the manifest last: make them the checkpoint `target`."""
        ...

    def discard(self, staging: PlaceT) -> None:
        """Remove what `begin` and `create` made; what cannot be removed is named in the log."""
        ...

    def free_bytes(self, folder: PlaceT) -> int | None:
        """What may still be written below it; None where nobody knows."""
        ...

    # ------------------------------------------------------------------ keeping

    def refuse_unwritable(self, root: PlaceT) -> None:
        """Raise CheckpointError where checkpoints below `root` could not be written, as far as it can be tried."""
        ...

    def unfinished(self, root: PlaceT) -> list[PlaceT]:
        """What killed writers left in `root`."""
        ...

    def remove(self, paths: Sequence[PlaceT]) -> None:
        """Checkpoints or what is unfinished; killed on the way, it leaves no half checkpoint."""
        ...

    def move(self, path: PlaceT, target: PlaceT) -> None:
        """Give a checkpoint another name in its folder."""
        ...


def storage_of(place: PlaceT, disk: Disk | None = None) -> Storage[PlaceT]:
    """Who reads and writes there; `disk` is whom a writer works through. CheckpointError where a driver is missing."""
    disk = disk or Disk()
    made: Storage[Path] | Storage[Address] = (
        LocalStorage(disk) if isinstance(place, Path) else RemoteStorage.of(place, disk.before)
    )
    return cast(Storage[PlaceT], made)


__all__ = ["NewFile", "Place", "Storage", "storage_of"]
