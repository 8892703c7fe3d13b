"""Who reads which chunks of a checkpoint's files, so that all ranks together read each at least once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from disttrain.checkpoint.form.manifest import FileInfo

ChunkRange = tuple[str, int, int]
"""Neighbouring chunks: their file's name, the first, and the one after the last."""


def all_chunks(files: Mapping[str, FileInfo]) -> list[tuple[str, int]]:
    """All chunks of a checkpoint, file by file."""
    return [(name, chunk) for name, info in files.items() for chunk in range(len(info.chunks))]


def merge_chunks(chunks: Iterable[tuple[str, int]]) -> list[ChunkRange]:
    """The same chunks as runs, in order."""
    runs: list[ChunkRange] = []
    for file, chunk in sorted(chunks):
        if runs and runs[-1][0] == file and runs[-1][2] == chunk:
            runs[-1] = (file, runs[-1][1], chunk + 1)
        else:
            runs.append((file, chunk, chunk + 1))
    return runs


def divide_unread(
    files: Mapping[str, FileInfo], read: Iterable[Sequence[ChunkRange]], count: int
) -> list[list[ChunkRange]]:
    """What nobody has read, cut into `count` equal parts."""
    known = {(file, chunk) for runs in read for file, first, stop in runs for chunk in range(first, stop)}
    rest = [one for one in all_chunks(files) if one not in known]
    return [merge_chunks(rest[len(rest) * part // count : len(rest) * (part + 1) // count]) for part in range(count)]
