"""Reading a checkpoint's files chunk by chunk, each held against its checksum.

Owns the open descriptor and the one buffer a reader needs; a store's files are filled into the same buffer by its own
`Fill`. Refuses links and whatever is no regular file of the size that the manifest gives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from disttrain.checkpoint.address import Place
from disttrain.checkpoint.checksum import crc32
from disttrain.checkpoint.manifest import MANIFEST, FileInfo
from disttrain.errors import CheckpointError, UnreadableError, explain

Fill = Callable[[memoryview, int], int]
"""Reads a file's bytes from a place on into a view; returns how many came, 0 at the end. OSError where it cannot."""


class ChunkReader:
    """One open file of a checkpoint and a buffer for one chunk of it. Made by a storage's `open_chunks`."""

    def __init__(self, fill: Fill, name: str, info: FileInfo, chunk_bytes: int) -> None:
        self.name = name
        self.buffer = bytearray(min(chunk_bytes, info.size))
        self._fill, self._info, self._chunk_bytes = fill, info, chunk_bytes

    def span(self, chunk: int) -> tuple[int, int]:
        """The file's bytes that a chunk is: (first, after the last)."""
        start = chunk * self._chunk_bytes
        return start, min(start + self._chunk_bytes, self._info.size)

    def read_into(self, view: memoryview, begin: int) -> str | None:
        """Fill a view with the file's bytes from `begin` on; a fault in words if there are too few."""
        at, end = begin, begin + len(view)
        try:
            while at < end:
                got = self._fill(view[at - begin :], at)
                if not got:
                    return f"{self.name} ends at byte {at} of {self._info.size}"
                at += got
        except OSError as error:
            return f"{self.name} cannot be read at byte {at}: {error.strerror}"
        return None

    def read(self, chunk: int, *, verify: bool) -> str | None:
        """Fill the buffer's beginning; a fault in words if the chunk is short or, with `verify`, its sum is another."""
        begin, end = self.span(chunk)
        view = memoryview(self.buffer)[: end - begin]
        fault = self.read_into(view, begin)
        if fault:
            return fault
        found, stored = crc32(view) if verify else 0, self._info.chunks[chunk]
        if verify and found != stored:
            return f"{self.name}, bytes {begin} to {end}: checksum {found:08x} instead of {stored:08x}"
        return None


@contextmanager
def open_chunks(path: Path, info: FileInfo, chunk_bytes: int) -> Iterator[ChunkReader]:
    """The file open for reading, if it is a regular one of the right size; CheckpointError if not."""
    descriptor = _open_plain(path, info.size)
    try:
        yield ChunkReader(lambda view, at: os.preadv(descriptor, [view], at), path.name, info, chunk_bytes)
    finally:
        os.close(descriptor)


def refuse_unusable(path: Path, info: FileInfo) -> None:
    """CheckpointError unless there is a regular file of that size that can be opened."""
    os.close(_open_plain(path, info.size))


def read_manifest_bytes(folder: Path) -> bytes:
    """What the folder's manifest holds; CheckpointError that says what is there instead."""
    try:
        if not folder.is_dir():
            raise unusable(folder, "a file" if folder.exists() else "no such folder")
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _refused(folder, error) from error
    if MANIFEST not in names:
        raise unusable(folder, whose_folder(names))
    with open(_open_plain(folder / MANIFEST, None), "rb") as file:
        return file.read()


_CONVERTER = "; disttrain ckpt convert PATH TARGET makes a checkpoint of it"


def whose_folder(names: Sequence[str]) -> str:
    """What a folder without a manifest holds, in words."""
    if not names:
        return "an empty folder"
    if ".metadata" in names:
        return f"a torch distributed checkpoint (.metadata), which is a pickle and is not read{_CONVERTER}"
    if any(name.startswith(("zero_", "mp_rank_")) or name == "latest" for name in names):
        return f"a DeepSpeed checkpoint, which is a pickle and is not read{_CONVERTER}"
    return f"no {MANIFEST} among {', '.join(names[:5])}"


def _open_plain(path: Path, size: int | None) -> int:
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise unusable(path, "a link" if stat.S_ISLNK(mode) else "no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(path, error) from error
    found = os.fstat(descriptor).st_size
    if size is not None and found != size:
        os.close(descriptor)
        raise unusable(path, f"{found} bytes instead of {size}")
    return descriptor


def _refused(path: Place, error: OSError) -> CheckpointError:
    found = unusable(path, str(error.strerror))
    return UnreadableError(str(found)) if isinstance(error, PermissionError) else found


def unusable(path: Place, found: str) -> CheckpointError:
    """The error for a folder or file that is not what a checkpoint has."""
    return CheckpointError(
        explain(f"{path} is not (part of) a whole checkpoint.", found, "name a whole folder step-NNNNNNNN of a run")
    )
