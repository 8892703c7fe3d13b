"""Reading a checkpoint's files chunk by chunk, each held against its checksum.

Owns the open descriptor and the one buffer a reader needs; a store's files are read by its own `Fill`. Refuses links
and whatever is no regular file of the size that the manifest gives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from disttrain.checkpoint.form.checksum import crc32
from disttrain.checkpoint.form.manifest import MANIFEST, FileInfo
from disttrain.checkpoint.storage.address import Place
from disttrain.errors import DamagedError, UnreadableError, explain

Fill = Callable[[memoryview, int], int]
"""Reads a file's bytes from a place on into a view; returns how many came, 0 at the end. OSError where it cannot."""


_PIECE = 512 * 2**10
"""What is read of a disk at once and summed while it is still in the processor's second cache: summing it then costs a
fifth of reading it, where after 16 MiB it costs as much again."""


class ChunkReader:
    """One open file of a checkpoint. Made by a storage's `open_chunks`.

    What is summed is read by `piece_bytes`; without, and what is not summed, by whole chunks: each time that a store is
    asked costs.
    """

    def __init__(self, ask: Fill, name: str, info: FileInfo, chunk_bytes: int, piece_bytes: int | None = None) -> None:
        self.name = name
        self.asks_cost = piece_bytes is None
        self._ask, self._info, self._chunk_bytes = ask, info, chunk_bytes
        self._piece_bytes = min(piece_bytes or chunk_bytes, chunk_bytes)

    @cached_property
    def buffer(self) -> bytearray:
        """Room for one chunk, which `read` fills."""
        return bytearray(min(self._chunk_bytes, self._info.size))

    @cached_property
    def _scrap(self) -> memoryview:
        """Where bytes go that are summed and that nobody asked for."""
        return memoryview(bytearray(min(self._piece_bytes, self._info.size)))

    def span(self, chunk: int) -> tuple[int, int]:
        """The file's bytes that a chunk is: (first, after the last)."""
        start = chunk * self._chunk_bytes
        return start, min(start + self._chunk_bytes, self._info.size)

    def check(self, chunk: int) -> str | None:
        """Hold a chunk against its checksum, and keep nothing of it; a fault in words if it does not fit."""
        return self.scatter(chunk, [], verify=True)

    def read(self, chunk: int, *, verify: bool) -> str | None:
        """Fill the buffer's beginning; a fault in words if the chunk is short or, with `verify`, its sum is another."""
        begin, end = self.span(chunk)
        return self.scatter(chunk, [(begin, memoryview(self.buffer)[: end - begin])], verify=verify)

    def scatter(self, chunk: int, places: Sequence[tuple[int, memoryview]], *, verify: bool) -> str | None:
        """Read parts of a chunk straight to where they belong: (first byte in the file, a view to fill) each.

        With `verify` the rest of the chunk is read too, and the places are in order and apart. A fault in words, as
        for `read`: then what the views hold is not to be used.
        """
        found, stored = 0, self._info.chunks[chunk]
        for at, view in self._with_gaps(chunk, places) if verify else places:
            fault = self.fill(view, at)
            if fault:
                return fault
            found = crc32(view, found) if verify else stored
        if verify and found != stored:
            begin, end = self.span(chunk)
            return f"{self.name}, bytes {begin} to {end}: checksum {found:08x} instead of {stored:08x}"
        return None

    def _with_gaps(self, chunk: int, places: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
        """The places and what lies around them, all of the chunk in order, by pieces."""
        at, end = self.span(chunk)
        size = self._piece_bytes
        for begin, view in [*places, (end, memoryview(b""))]:
            yield from ((start, self._scrap[: begin - start]) for start in range(at, begin, size))
            yield from ((begin + done, view[done : done + size]) for done in range(0, len(view), size))
            at = begin + len(view)

    def fill(self, view: memoryview, begin: int) -> str | None:
        """Fill a view with the file's bytes from `begin` on, not summed; a fault in words if there are too few."""
        at, end = begin, begin + len(view)
        try:
            while at < end:
                got = self._ask(view[at - begin :], at)
                if not got:
                    return f"{self.name} ends at byte {at} of {self._info.size}"
                at += got
        except OSError as error:
            return f"{self.name} cannot be read at byte {at}: {error.strerror}"
        return None


@contextmanager
def open_chunks(path: Path, info: FileInfo, chunk_bytes: int) -> Iterator[ChunkReader]:
    """The file open for reading, if it is a regular one of the right size; DamagedError if not."""
    descriptor = _open_plain(path, info.size)
    try:
        yield ChunkReader(lambda view, at: os.preadv(descriptor, [view], at), path.name, info, chunk_bytes, _PIECE)
    finally:
        os.close(descriptor)


def refuse_unusable(path: Path, info: FileInfo) -> None:
    """DamagedError unless there is a regular file of that size that can be opened."""
    os.close(_open_plain(path, info.size))


def read_manifest_bytes(folder: Path) -> bytes:
    """What the folder's manifest holds; DamagedError that says what is there instead."""
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


def _refused(path: Place, error: OSError) -> DamagedError | UnreadableError:
    found = unusable(path, str(error.strerror))
    return UnreadableError(str(found)) if isinstance(error, PermissionError) else found


def unusable(path: Place, found: str) -> DamagedError:
    """The error for a folder or file that is not what a checkpoint has."""
    return DamagedError(
        explain(f"{path} is not (part of) a whole checkpoint.", found, "name a whole folder step-NNNNNNNN of a run")
    )
