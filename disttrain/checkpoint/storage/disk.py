"""Every file-system operation of the writer, in one place, so that a test can stop or fail it at any of them.

Owns durability: what `sync` returned from survives a power cut. Knows nothing of checkpoints.
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

from disttrain.logs import room_logger

Before = Callable[[str, Any], None]
"""Called with an operation's name and place before it happens; may raise, or kill the process."""


def _nothing(operation: str, path: Path) -> None:
    return


_DIRECT = getattr(os, "O_DIRECT", 0)
"""Past the kernel's cache of pages; 0 where there is no such thing (macOS)."""
_DIRECT_ON = {"ext4", "xfs"}
"""Where that is a win: ext4 was measured, XFS was made for it. A network file system would wait for each piece."""
_PIECE = 8 * 2**20
"""What a large file is handed to the disk in, and held in memory beside the state while it is written."""
_BLOCK = 4096
"""What addresses, places and lengths are multiples of on that way: the largest sector in use."""


class DiskFile:
    """A new file being written; made by `Disk.create`.

    A large one goes `direct`ly to a local disk: a page cache that nobody reads costs a quarter of a second and more of
    processor for a GiB, the copy into one aligned buffer a tenth, and training beside a save has what is left.
    """

    def __init__(self, path: Path, before: Before, *, direct: bool = False) -> None:
        self._path, self._before = path, before
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._size = 0
        direct = direct and file_system(self._descriptor) in _DIRECT_ON and _set_direct(self._descriptor, True)
        self._aligned = _Aligned(self._put) if direct else None

    def write(self, content: memoryview | bytes) -> None:
        """All of `content`, after what is there; it may lie in memory until `sync`."""
        self._before("write", self._path)
        (self._put if self._aligned is None else self._aligned.write)(memoryview(content))

    def sync(self) -> None:
        """Return when the content is on the disk."""
        self._before("sync", self._path)
        if self._aligned is not None:
            self._aligned.put_blocks()
            _set_direct(self._descriptor, False)  # what fills no block goes through the cache
            self._put(self._aligned.rest)
            self._aligned = None
        os.fsync(self._descriptor)

    def _put(self, rest: memoryview) -> None:
        begin, self._size = self._size, self._size + len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # A file system that wants other blocks, or none of this; also after a write that a full disk cut short.
                refused = error.errno in (errno.EINVAL, errno.ENOTSUP)
                if not (refused and _set_direct(self._descriptor, False)):
                    raise
        # The disk begins at once, and the last `sync` has little left to wait for; nor does memory fill with what
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
    """What is written, gathered in an aligned buffer, from which the disk takes it by whole blocks."""

    def __init__(self, put: Callable[[memoryview], None]) -> None:
        self._put = put
        # Shared: a process that is forked meanwhile (a data worker) then cannot make the kernel copy it.
        self._memory = mmap.mmap(-1, _PIECE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._filled = 0

    def write(self, content: memoryview) -> None:
        rest = np.frombuffer(content, np.uint8)
        while rest.size:
            part = rest[: _PIECE - self._filled]
            np.copyto(self._bytes[self._filled : self._filled + part.size], part)  # without Python's lock
            self._filled += part.size
            rest = rest[part.size :]
            if self._filled == _PIECE:
                self._put(memoryview(self._memory))
                self._filled = 0

    def put_blocks(self) -> None:
        """All whole blocks; `rest` is what is left."""
        self._put(memoryview(self._memory)[: self._filled - self._filled % _BLOCK])

    @property
    def rest(self) -> memoryview:
        """What fills no block."""
        return memoryview(self._memory)[self._filled - self._filled % _BLOCK : self._filled]


def file_system(descriptor: int) -> str:
    """The kind of file system that an open file lies on, by its device in Linux's table of mounts; else empty."""
    found = os.fstat(descriptor).st_dev
    device = f"{os.major(found)}:{os.minor(found)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            own, _, rest = line.partition(" - ")
            if own.split()[2] == device:
                return rest.split()[0]
    return ""


def _set_direct(descriptor: int, on: bool) -> bool:
    """Write past the cache from now on, or through it; whether that is a change, which some systems refuse."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | _DIRECT if on else flags & ~_DIRECT
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
        return wanted != flags
    return False


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

    def create(self, path: Path, size: int = 0) -> DiskFile:
        """A new file of about `size` bytes; FileExistsError if there is something of that name."""
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
