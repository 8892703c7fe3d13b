"""Divides the chunks of a checkpoint's files among ranks, so that together they read each chunk at least once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from disttrain.checkpoint.form.manifest import FileInfo

ChunkRange = tuple[str, int, int]
"""Consecutive chunks of a file: its name, the first chunk, and the one after the last."""


def all_chunks(files: Mapping[str, FileInfo]) -> list[tuple[str, int]]:
    """Return all chunks of a checkpoint, file by file."""
    return [(name, chunk) for name, info in files.items() for chunk in range(len(info.chunks))]


def merge_chunks(chunks: Iterable[tuple[str, int]]) -> list[ChunkRange]:
    """Merge single chunks into ranges, in order."""
    ranges: list[ChunkRange] = []
    for file, chunk in sorted(chunks):
        if ranges and ranges[-1][0] == file and ranges[-1][2] == chunk:
            ranges[-1] = (file, ranges[-1][1], chunk + 1)
        else:
            ranges.append((file, chunk, chunk + 1))
    return ranges


def divide_unread(
    files: Mapping[str, FileInfo], read: Iterable[Sequence[ChunkRange]], count: int
) -> list[list[ChunkRange]]:
    """Divide the chunks that are in none of the ranges in `read` into `count` equal parts."""
    known = {(file, chunk) for ranges in read for file, first, stop in ranges for chunk in range(first, stop)}
    rest = [chunk for chunk in all_chunks(files) if chunk not in known]
    return [merge_chunks(rest[len(rest) * part // count : len(rest) * (part + 1) // count]) for part in range(count)]
