"""Defines the interface to the storage of checkpoints and selects the implementation for a location.

Each storage has its own commit: a disk renames a finished folder, and in an object store the manifest appears last. In
both, a folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol, cast

from disttrain.checkpoint.form.manifest import FileInfo
from disttrain.checkpoint.storage.chunk_reader import ChunkReader
from disttrain.checkpoint.storage.durable_files import Disk
from disttrain.checkpoint.storage.local_storage import LocalStorage
from disttrain.checkpoint.storage.location import Address, Location, LocationT
from disttrain.checkpoint.storage.remote_storage import RemoteStorage
from disttrain.errors import CheckpointError


class NewFile(Protocol):
    """A file that is being written. Closed without `sync`, it has no valid content."""

    def write(self, content: memoryview | bytes) -> None:
        """Append all of `content`."""
        ...

    def sync(self) -> None:
        """Return when the content is durable. Nothing is written afterwards."""
        ...


class Storage(Protocol[LocationT]):
    """The storage operations. All are local to the calling process.

    A store that cannot be reached raises CheckpointError. Write operations, and all failures of a disk, raise OSError
    with a message and a path.
    """

    # ------------------------------------------------------------------ listing

    def names(self, folder: LocationT) -> list[str]:
        """Return the names directly in a folder. A missing folder has none."""
        ...

    def taken(self, path: LocationT) -> bool:
        """Return whether the name exists, as a file, a folder or anything else."""
        ...

    def size(self, path: LocationT) -> int | None:
        """Return a file's size in bytes, or None if there is no such file."""
        ...

    def bytes_at(self, path: LocationT) -> int:
        """Return the bytes of a file or of all files below a folder. Files that vanish meanwhile do not count."""
        ...

    def written_at(self, path: LocationT) -> datetime | None:
        """Return when a file was last written, by the storage's clock. Return None if it is gone or unknown."""
        ...

    # ------------------------------------------------------------------ reading; CheckpointError names the problem

    def read_manifest(self, folder: LocationT) -> bytes:
        """Return the content of the folder's manifest. Without one, the error describes the folder's content."""
        ...

    def unusable(self, folder: LocationT, files: Mapping[str, FileInfo]) -> Iterator[tuple[str, CheckpointError]]:
        """Yield the files that are missing or have another size, each with the error that describes it."""
        ...

    def open_chunks(self, path: LocationT, info: FileInfo, chunk_bytes: int) -> AbstractContextManager[ChunkReader]:
        """Open a file to read it chunk by chunk."""
        ...

    # ------------------------------------------------------------------ writing one checkpoint

    def begin(self, target: LocationT) -> LocationT:
        """Create a new folder for the files of `target`. It is not a checkpoint before `commit`."""
        ...

    def create(self, path: LocationT, size: int) -> AbstractContextManager[NewFile]:
        """Create a file that will have `size` bytes."""
        ...

    def sync_folder(self, folder: LocationT) -> None:
        """Return when the names in the folder are durable."""
        ...

    def commit(self, staging: LocationT, target: LocationT) -> None:
        """Turn the finished files into the checkpoint `target`. All are written, the manifest last."""
        ...

    def discard(self, staging: LocationT) -> None:
        """Remove everything that `begin` and `create` made. A warning in the log names what cannot be removed."""
        ...

    def free_bytes(self, folder: LocationT) -> int | None:
        """Return how many bytes can still be written below a folder, or None if that is unknown."""
        ...

    # ------------------------------------------------------------------ retention

    def reject_unwritable(self, root: LocationT) -> None:
        """Raise CheckpointError if checkpoints below `root` cannot be written, as far as that can be tested."""
        ...

    def unfinished(self, root: LocationT) -> list[LocationT]:
        """Return the folders that killed writers left in `root`."""
        ...

    def remove(self, paths: Sequence[LocationT]) -> None:
        """Remove checkpoints or unfinished folders. A process killed meanwhile leaves no partial checkpoint."""
        ...

    def move(self, path: LocationT, target: LocationT) -> None:
        """Rename a checkpoint within its folder."""
        ...


def storage_of(location: LocationT, disk: Disk | None = None) -> Storage[LocationT]:
    """Return the storage that reads and writes a location. Writes use `disk`.

    Raises CheckpointError if the driver of an address is not installed.
    """
    disk = disk or Disk()
    made: Storage[Path] | Storage[Address] = (
        LocalStorage(disk) if isinstance(location, Path) else RemoteStorage.of(location, disk.before)
    )
    return cast(Storage[LocationT], made)


__all__ = ["Location", "NewFile", "Storage", "storage_of"]
