"""Reads a checkpoint file chunk by chunk and compares each chunk with its checksum.

`ChunkReader` owns the one buffer that a reader needs. Each storage opens its files and passes a function that reads
bytes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from disttrain.checkpoint.form.checksum import crc32
from disttrain.checkpoint.form.manifest import FileInfo

ReadInto = Callable[[memoryview, int], int]
"""Reads a file's bytes from an offset into a view. Returns the number of bytes, 0 at the end. Raises OSError."""


class ChunkReader:
    """One open file of a checkpoint. A storage's `open_chunks` creates it.

    With `piece_bytes`, bytes that are verified are read in pieces of that size. Without it, and where nothing is
    verified, complete chunks are read, because every request to an object store costs time.
    """

    def __init__(
        self, read_into: ReadInto, name: str, info: FileInfo, chunk_bytes: int, piece_bytes: int | None = None
    ) -> None:
        self.name = name
        self.requests_are_slow = piece_bytes is None
        self._read_into, self._info, self._chunk_bytes = read_into, info, chunk_bytes
        self._piece_bytes = min(piece_bytes or chunk_bytes, chunk_bytes)

    @cached_property
    def buffer(self) -> bytearray:
        """Memory for one chunk, which `read` fills."""
        return bytearray(min(self._chunk_bytes, self._info.size))

    @cached_property
    def _scrap(self) -> memoryview:
        """Memory for bytes that are read only for their checksum."""
        return memoryview(bytearray(min(self._piece_bytes, self._info.size)))

    def span(self, chunk: int) -> tuple[int, int]:
        """Return the byte range of a chunk in the file: the first byte, and the one after the last."""
        start = chunk * self._chunk_bytes
        return start, min(start + self._chunk_bytes, self._info.size)

    def check(self, chunk: int) -> str | None:
        """Compare a chunk with its checksum and discard its bytes. Return the problem in words, or None."""
        return self.scatter(chunk, [], verify=True)

    def read(self, chunk: int, *, verify: bool) -> str | None:
        """Read a chunk into the beginning of the buffer.

        Return the problem in words if the chunk is too short or, with `verify`, its checksum differs. Otherwise return
        None.
        """
        begin, end = self.span(chunk)
        return self.scatter(chunk, [(begin, memoryview(self.buffer)[: end - begin])], verify=verify)

    def scatter(self, chunk: int, targets: Sequence[tuple[int, memoryview]], *, verify: bool) -> str | None:
        """Read parts of a chunk directly into their target memory.

        Each target is the offset of its first byte in the file, and the view to fill. With `verify`, the rest of the
        chunk is read too. The targets must then be in ascending order and must not overlap. Return a problem in words
        as `read` does. After a problem, the content of the views must not be used.
        """
        actual, stored = 0, self._info.chunks[chunk]
        for at, view in self._with_gaps(chunk, targets) if verify else targets:
            fault = self.fill(view, at)
            if fault:
                return fault
            actual = crc32(view, actual) if verify else stored
        if verify and actual != stored:
            begin, end = self.span(chunk)
            return f"{self.name}, bytes {begin} to {end}: checksum {actual:08x} instead of {stored:08x}"
        return None

    def _with_gaps(self, chunk: int, targets: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
        """Yield the targets and the gaps between them in order, in pieces. Together they cover the chunk."""
        at, end = self.span(chunk)
        size = self._piece_bytes
        for begin, view in [*targets, (end, memoryview(b""))]:
            yield from ((start, self._scrap[: begin - start]) for start in range(at, begin, size))
            yield from ((begin + done, view[done : done + size]) for done in range(0, len(view), size))
            at = begin + len(view)

    def fill(self, view: memoryview, begin: int) -> str | None:
        """Fill a view with the file's bytes from `begin` on, without a checksum.

        Return the problem in words if the file has too few bytes or cannot be read.
        """
        at, end = begin, begin + len(view)
        try:
            while at < end:
                got = self._read_into(view[at - begin :], at)
                if not got:
                    return f"{self.name} ends at byte {at} of {self._info.size}"
                at += got
        except OSError as error:
            return f"{self.name} cannot be read at byte {at}: {error.strerror}"
        return None
