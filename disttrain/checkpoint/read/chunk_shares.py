"""Who reads which chunks of a checkpoint's files, so that all ranks together read each at least once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from disttrain.checkpoint.form.manifest import FileInfo

ChunkRun = tuple[str, int, int]
"""Neighbouring chunks: their file's name, the first, and the one after the last."""


def every_chunk(files: Mapping[str, FileInfo]) -> list[tuple[str, int]]:
    """All chunks of a checkpoint, file by file."""
    return [(name, chunk) for name, info in files.items() for chunk in range(len(info.chunks))]


def runs_of(chunks: Iterable[tuple[str, int]]) -> list[ChunkRun]:
    """The same chunks as runs, in order."""
    runs: list[ChunkRun] = []
    for file, chunk in sorted(chunks):
        if runs and runs[-1][0] == file and runs[-1][2] == chunk:
            runs[-1] = (file, runs[-1][1], chunk + 1)
        else:
            runs.append((file, chunk, chunk + 1))
    return runs


def share_unread(files: Mapping[str, FileInfo], read: Iterable[Sequence[ChunkRun]], count: int) -> list[list[ChunkRun]]:
    """What nobody has read, cut into `count` equal parts."""
    known = {(file, chunk) for runs in read for file, first, stop in runs for chunk in range(first, stop)}
    rest = [one for one in every_chunk(files) if one not in known]
    return [runs_of(rest[len(rest) * part // count : len(rest) * (part + 1) // count]) for part in range(count)]
