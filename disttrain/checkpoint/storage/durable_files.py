"""Performs every file-system operation of a checkpoint writer, durably.

Content for which `sync` has returned survives a power cut. The operations are in one module so that a test can fail or
stop the process at any of them. This module knows nothing about checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from disttrain.logs import package_logger

Before = Callable[[str, Any], None]
"""Called with the name and path of an operation before it is performed. It may raise an error or kill the process."""


def _nothing(operation: str, path: Path) -> None:
    return


_DIRECT = getattr(os, "O_DIRECT", 0)
"""The flag for writes that bypass the kernel's page cache. It is 0 where there is none (macOS)."""
_DIRECT_ON = {"ext4", "xfs"}
"""File systems on which direct writes are faster.

ext4 was measured, and XFS was designed for them. A network file system would wait for each piece.
"""
_PIECE = 8 * 2**20
"""Bytes written to the disk at once for a large file. A buffer of this size is held in memory during the write."""
_BLOCK = 4096
"""Addresses, offsets and lengths of direct writes are multiples of this: the largest sector size in use."""


class DiskFile:
    """A new file that is being written. `Disk.create` makes it.

    A large file is written `direct`ly to a local disk. Filling a page cache that nobody reads costs a quarter of a
    second or more of processor time per GiB. The copy into one aligned buffer costs a tenth of a second. Training that
    continues during the save gains the difference.
    """

    def __init__(self, path: Path, before: Before, *, direct: bool = False) -> None:
        self._path, self._before = path, before
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._size = 0
        direct = direct and file_system(self._descriptor) in _DIRECT_ON and _set_direct(self._descriptor, True)
        self._aligned = _Aligned(self._put) if direct else None

    def write(self, content: memoryview | bytes) -> None:
        """Append all of `content`. It may stay in memory until `sync`."""
        self._before("write", self._path)
        (self._put if self._aligned is None else self._aligned.write)(memoryview(content))

    def sync(self) -> None:
        """Return when the content is on the disk."""
        self._before("sync", self._path)
        if self._aligned is not None:
            self._aligned.put_blocks()
            _set_direct(self._descriptor, False)  # the remainder does not fill a block and needs the page cache
            self._put(self._aligned.rest)
            self._aligned = None
        os.fsync(self._descriptor)

    def _put(self, rest: memoryview) -> None:
        begin, self._size = self._size, self._size + len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # The file system needs other blocks or does not support direct writes. This also happens after a full
                # disk has shortened a write.
                unsupported = error.errno in (errno.EINVAL, errno.ENOTSUP)
                if not (unsupported and _set_direct(self._descriptor, False)):
                    raise
        # The disk starts writing now, so the final `sync` waits only briefly. Memory does not fill with pages that
        # nobody reads soon.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, self._size - begin, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


class _Aligned:
    """Collects content in an aligned buffer, which is written to the disk in full blocks."""

    def __init__(self, put: Callable[[memoryview], None]) -> None:
        self._put = put
        # The mapping is shared. Otherwise the kernel would copy it when a process, such as a data worker, is forked.
        self._memory = mmap.mmap(-1, _PIECE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._filled = 0

    def write(self, content: memoryview) -> None:
        rest = np.frombuffer(content, np.uint8)
        while rest.size:
            part = rest[: _PIECE - self._filled]
            np.copyto(self._bytes[self._filled : self._filled + part.size], part)  # releases the GIL
            self._filled += part.size
            rest = rest[part.size :]
            if self._filled == _PIECE:
                self._put(memoryview(self._memory))
                self._filled = 0

    def put_blocks(self) -> None:
        """Write all full blocks. `rest` is the remainder."""
        self._put(memoryview(self._memory)[: self._filled - self._filled % _BLOCK])

    @property
    def rest(self) -> memoryview:
        """The bytes that do not fill a block."""
        return memoryview(self._memory)[self._filled - self._filled % _BLOCK : self._filled]


def file_system(descriptor: int) -> str:
    """Return the type of an open file's file system, by its device in Linux's mount table; empty if unknown."""
    found = os.fstat(descriptor).st_dev
    device = f"{os.major(found)}:{os.minor(found)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            own, _, rest = line.partition(" - ")
            if own.split()[2] == device:
                return rest.split()[0]
    return ""


def _set_direct(descriptor: int, on: bool) -> bool:
    """Turn direct writes on or off. Return whether that changed anything: some systems do not support it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | _DIRECT if on else flags & ~_DIRECT
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
        return wanted != flags
    return False


class Disk:
    """The file system as the writer sees it. `before` is called before every operation."""

    def __init__(self, before: Before = _nothing) -> None:
        self._before = before

    @property
    def before(self) -> Before:
        """The function called before every operation, for storages that perform other operations."""
        return self._before

    def make_folder(self, path: Path) -> None:
        """Create a folder, and its missing parents. The parents are on the disk when this returns."""
        self._before("make_folder", path)
        for parent in [parent for parent in reversed(path.parents) if not parent.exists()]:
            parent.mkdir(exist_ok=True)
            self.sync_folder(parent.parent)  # otherwise a power cut could remove all checkpoints below it
        path.mkdir()

    def create(self, path: Path, size: int = 0) -> DiskFile:
        """Create a file of about `size` bytes. Raises FileExistsError if the name exists."""
        self._before("create", path)
        return DiskFile(path, self._before, direct=size >= _PIECE)

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
        """Give a folder its final name.

        Raises FileExistsError if that name exists. A plain rename would replace an empty folder.
        """
        self._before("rename", target)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "the name exists already", str(target))
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and its content. A warning in the log names what cannot be removed."""
        self._before("remove_tree", path)
        with contextlib.suppress(FileNotFoundError):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                raise
            except OSError as error:
                package_logger("checkpoint").warning("%s could not be removed: %s", path, error)


def free_bytes(path: Path) -> int:
    """Return the bytes that a user can still write below `path`, or below its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
