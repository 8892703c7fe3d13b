"""Plans which byte ranges of a checkpoint file are copied into which tensors.

A copy is direct if the file's bytes are read straight into the tensor, and buffered otherwise. All functions are pure
except `ChunkCopy.perform`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, flat_range_to_boxes, overlap
from disttrain.checkpoint.form.tensor_bytes import raw_bytes


@dataclass(frozen=True)
class FillTask:
    """Fills `into`, the `box` of a tensor, with its overlap with a `stored` box.

    The bytes of the stored box begin at byte `start` of the file.
    """

    stored: Box
    start: int
    dtype: torch.dtype
    box: Box
    into: Tensor

    def offset(self, part: Box) -> int:
        """Return the offset in the file of the first byte of a box inside the stored box."""
        flat = 0
        for offset, origin, size in zip(part.offsets, self.stored.offsets, self.stored.sizes, strict=True):
            flat = flat * size + offset - origin
        return self.start + flat * self.dtype.itemsize

    def hull(self) -> tuple[int, int]:
        """Return the byte range in the file from the first requested element to the end of the last one."""
        shared = overlap(self.stored, self.box)
        assert shared is not None  # a task is only made for boxes that overlap
        last = Box(tuple(stop - 1 for stop in shared.stops), (1,) * len(shared.sizes))
        return self.offset(shared), self.offset(last) + self.dtype.itemsize

    def copies(self, begin: int, end: int) -> Iterator[ChunkCopy]:
        """Yield the copies from bytes `begin` to `end` of the file."""
        first, item, box = self.start, self.dtype.itemsize, self.stored
        start = max(begin - first, 0) // item
        stop = min(end - first, box.numel * item) // item
        for piece in flat_range_to_boxes(box.sizes, start, stop):
            held = piece.shifted(box.offsets)
            shared = overlap(held, self.box)
            if shared:
                yield ChunkCopy(self, held, shared)


@dataclass(frozen=True)
class ChunkCopy:
    """One copy from a chunk. `held` is contiguous in the file, and `shared` is the requested part of it."""

    task: FillTask
    held: Box
    shared: Box

    @property
    def first(self) -> int:
        """The offset of the first byte of `held` in the file."""
        return self.task.offset(self.held)

    def target_bytes(self) -> memoryview | None:
        """Return the tensor's memory if its bytes are equal to those of the file one by one. Otherwise return None."""
        into = self.task.into[self.shared.slices(self.task.box.offsets)]
        same = self.shared == self.held and into.dtype == self.task.dtype and into.device.type == "cpu"
        if not same or not into.is_contiguous() or into.is_conj() or into.is_neg():
            return None
        return raw_bytes(into)

    def perform(self, buffer: bytearray, begin: int) -> None:
        """Copy from a buffer whose first byte is byte `begin` of the file."""
        count, offset = self.held.numel, self.first - begin
        source = torch.frombuffer(buffer, dtype=self.task.dtype, count=count, offset=offset).view(self.held.sizes)
        into = self.task.into[self.shared.slices(self.task.box.offsets)]
        into.copy_(source[self.shared.slices(self.held.offsets)])


def split_direct(
    copies: Sequence[ChunkCopy], verified: bool
) -> tuple[list[tuple[ChunkCopy, memoryview]], list[ChunkCopy]]:
    """Return the direct copies of a chunk, each with the memory to read into, and the buffered copies.

    A chunk that is not yet `verified` is read and added to the checksum once, so all its copies are of one kind.
    """
    views = [(copy, copy.target_bytes()) for copy in copies]
    direct = [(copy, view) for copy, view in views if view is not None]
    buffered = [copy for copy, view in views if view is None]
    separate = all(one.first + len(view) <= two.first for (one, view), (two, _) in pairwise(direct))
    return (direct, buffered) if verified or (separate and not buffered) else ([], list(copies))


def plan_copies(tasks: Sequence[FillTask], chunk_bytes: int) -> Iterator[tuple[int, list[ChunkCopy]]]:
    """Yield the chunks of a file that hold requested elements, in order, each with its copies."""
    by_chunk: dict[int, list[FillTask]] = defaultdict(list)
    for task in tasks:
        first, last = task.hull()
        for chunk in range(first // chunk_bytes, (last - 1) // chunk_bytes + 1):
            by_chunk[chunk].append(task)
    for chunk in sorted(by_chunk):
        begin = chunk * chunk_bytes
        copies = [copy for task in by_chunk[chunk] for copy in task.copies(begin, begin + chunk_bytes)]
        if copies:
            yield chunk, copies
