"""What to copy of a file's chunks into which tensors, and by which way. Pure but for the copies themselves."""

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
    """Fill `into`, which is `box` of a tensor, from what a `stored` box, from byte `start` on, shares with it."""

    stored: Box
    start: int
    dtype: torch.dtype
    box: Box
    into: Tensor

    def place(self, held: Box) -> int:
        """The first byte in the file of a box inside the stored one."""
        flat = 0
        for offset, origin, size in zip(held.offsets, self.stored.offsets, self.stored.sizes, strict=True):
            flat = flat * size + offset - origin
        return self.start + flat * self.dtype.itemsize

    def hull(self) -> tuple[int, int]:
        """The bytes in the file from the first to after the last element asked for."""
        shared = overlap(self.stored, self.box)
        assert shared is not None  # a job is made for boxes that meet
        last = Box(tuple(stop - 1 for stop in shared.stops), (1,) * len(shared.sizes))
        return self.place(shared), self.place(last) + self.dtype.itemsize

    def copies(self, begin: int, end: int) -> Iterator[ChunkCopy]:
        """What to copy of the file's bytes `begin` to `end`."""
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
    """`held` is contiguous in the file; `shared` is what is asked of it."""

    job: FillTask
    held: Box
    shared: Box

    @property
    def first(self) -> int:
        """The first byte of `held` in the file."""
        return self.job.place(self.held)

    def bytes_in_place(self) -> memoryview | None:
        """The tensor's own bytes, where they are those of the file one by one; None where they are not."""
        into = self.job.into[self.shared.slices(self.job.box.offsets)]
        same = self.shared == self.held and into.dtype == self.job.dtype and into.device.type == "cpu"
        if not same or not into.is_contiguous() or into.is_conj() or into.is_neg():
            return None
        return raw_bytes(into)

    def perform(self, buffer: bytearray, begin: int) -> None:
        """Copy out of a buffer whose first byte is the file's byte `begin`."""
        count, place = self.held.numel, self.first - begin
        source = torch.frombuffer(buffer, dtype=self.job.dtype, count=count, offset=place).view(self.held.sizes)
        into = self.job.into[self.shared.slices(self.job.box.offsets)]
        into.copy_(source[self.shared.slices(self.held.offsets)])


def split_direct(
    copies: Sequence[ChunkCopy], known: bool
) -> tuple[list[tuple[ChunkCopy, memoryview]], list[ChunkCopy]]:
    """The copies of a chunk that can be read straight into their tensors, with those bytes; the others.

    A chunk that is not `known` to be right is summed as it is read, every byte once: all of it goes one way.
    """
    views = [(copy, copy.bytes_in_place()) for copy in copies]
    direct = [(copy, view) for copy, view in views if view is not None]
    through = [copy for copy, view in views if view is None]
    apart = all(one.first + len(view) <= two.first for (one, view), (two, _) in pairwise(direct))
    return (direct, through) if known or (apart and not through) else ([], list(copies))


def plan_copies(jobs: Sequence[FillTask], chunk_bytes: int) -> Iterator[tuple[int, list[ChunkCopy]]]:
    """The chunks of a file that hold something asked for, in order, each with what to copy of it."""
    by_chunk: dict[int, list[FillTask]] = defaultdict(list)
    for job in jobs:
        first, last = job.hull()
        for chunk in range(first // chunk_bytes, (last - 1) // chunk_bytes + 1):
            by_chunk[chunk].append(job)
    for chunk in sorted(by_chunk):
        begin = chunk * chunk_bytes
        copies = [copy for job in by_chunk[chunk] for copy in job.copies(begin, begin + chunk_bytes)]
        if copies:
            yield chunk, copies
