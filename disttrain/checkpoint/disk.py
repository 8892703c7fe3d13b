"""Every file-system operation of the writer, in one place, so that a test can stop or fail it at any of them.

Owns durability: what `sync` returned from survives a power cut. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from disttrain.logs import room_logger

Before = Callable[[str, Any], None]
"""Called with an operation's name and place before it happens; may raise, or kill the process."""


def _nothing(operation: str, path: Path) -> None:
    return


class DiskFile:
    """A new file being written; made by `Disk.create`."""

    def __init__(self, path: Path, before: Before) -> None:
        self._path, self._before = path, before
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._size = 0

    def write(self, content: memoryview | bytes) -> None:
        """All of `content`, after what is there."""
        self._before("write", self._path)
        rest = memoryview(content)
        begin, self._size = self._size, self._size + len(rest)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        # The disk begins at once, and the last `sync` has little left to wait for; nor does memory fill with what
        # nobody reads soon.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, self._size - begin, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Return when the content is on the disk."""
        self._before("sync", self._path)
        os.fsync(self._descriptor)

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


class Disk:
    """The file system as the writer sees it. `before` stands in front of every operation."""

    def __init__(self, before: Before = _nothing) -> None:
        self._before = before

    @property
    def before(self) -> Before:
        """What stands in front of a writer's operations, for a store that has other ones."""
        return self._before

    def make_folder(self, path: Path) -> None:
        """One new folder; its parents too, where they are missing. Those are on the disk when it returns."""
        self._before("make_folder", path)
        for parent in [parent for parent in reversed(path.parents) if not parent.exists()]:
            parent.mkdir(exist_ok=True)
            self.sync_folder(parent.parent)  # else a power cut takes all that was ever committed below it
        path.mkdir()

    def create(self, path: Path) -> DiskFile:
        """A new file; FileExistsError if there is something of that name."""
        self._before("create", path)
        return DiskFile(path, self._before)

    def sync_folder(self, path: Path) -> None:
        """Return when the folder's entries are on the disk."""
        self._before("sync_folder", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder its final name; FileExistsError if that name is taken (rename would replace an empty one)."""
        self._before("rename", target)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "the name is taken", str(target))
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """A folder and all in it; what cannot be removed stays and is named in the log."""
        self._before("remove_tree", path)
        with contextlib.suppress(FileNotFoundError):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                raise
            except OSError as error:
                room_logger("checkpoint").warning("%s could not be removed: %s", path, error)


def free_bytes(path: Path) -> int:
    """What a user may still write below `path`, or below its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
