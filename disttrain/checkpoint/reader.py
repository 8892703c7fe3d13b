"""Reading a checkpoint: its manifest first, then only the chunks that hold what is asked for, each checked.

`Checkpoint` is local: no rank waits for another. Holds one chunk in memory beyond the tensors it fills. Refuses links,
paths that leave the folder, and every byte whose checksum does not fit.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.boxes import Box, flat_range_to_boxes, overlap, whole
from disttrain.checkpoint.manifest import MANIFEST, Manifest, StoredBox, TensorInfo, decode_manifest
from disttrain.checkpoint.shards import Shard, refuse_bad_shards
from disttrain.errors import CheckpointError, explain


@dataclass(frozen=True)
class Differences:
    """How the names asked for differ from those stored: `missing` from the checkpoint, `unexpected` in it."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """Fill `into`, which is `box` of a tensor, from what a stored box shares with it."""

    name: str
    stored: StoredBox
    dtype: torch.dtype
    box: Box
    into: Tensor


class Checkpoint:
    """A committed checkpoint on disk. Made by `Checkpoint.open`."""

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool) -> None:
        self.path = path
        self._manifest = manifest
        self._verify = verify
        self._checked: set[tuple[str, int]] = set()

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Checkpoint:
        """Read and check the manifest, and that every file is there with its size; tensors stay on disk. Local.

        With `verify`, every chunk read later is checked against its checksum before its bytes are used. Raises
        CheckpointError for whatever is not a whole checkpoint.
        """
        path = Path(path)
        manifest = decode_manifest(_read_manifest(path), where=str(path / MANIFEST))
        checkpoint = cls(path, manifest, verify=verify)
        for name in manifest.files:
            os.close(checkpoint._open_file(name))
        return checkpoint

    @property
    def step(self) -> int:
        """The optimizer steps done when it was saved."""
        return self._manifest.step

    @property
    def document(self) -> dict[str, Any]:
        """The engine's JSON object."""
        return dict(self._manifest.document)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is stored, by name."""
        return self._manifest.tensors

    @property
    def manifest(self) -> Manifest:
        """All that the manifest says."""
        return self._manifest

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or one box of it, in host memory. Local."""
        if name not in self.tensors:
            near = [other for other in self.tensors if other.split("/")[-1] == name.split("/")[-1]][:5]
            found = f"{len(self.tensors)} other tensors" + (f", such as {', '.join(near)}" if near else "")
            raise CheckpointError(explain(f"{self.path} has no tensor {name}.", found, "see its `tensors`"))
        info = self.tensors[name]
        box = whole(info.shape) if box is None else box
        into = torch.empty(box.sizes, dtype=info.dtype)
        self.load_into([Shard(name, info.shape, box, into)], strict=False)
        return into

    def load_into(self, shards: Sequence[Shard], *, strict: bool = True, ignore: Collection[str] = ()) -> Differences:
        """Copy what is stored into the shards' tensors, whatever boxes it was saved in. Local; two passes.

        Nothing is written before all names and shapes fit and (with `verify`) every chunk needed was read and checked.
        `strict` refuses missing names, and stored ones that no shard asks for, but for those in `ignore`. Floating dtypes
        are converted to the shard's; any other change of dtype is refused. Raises CheckpointError with all
        missing, unexpected and misshapen names.
        """
        refuse_bad_shards(list(shards), f"{self.path} could not be loaded.")
        differences = self._compare(shards, strict, ignore)
        jobs = self._plan_jobs(shards)
        if self._verify:
            faults = [fault for file, own in jobs.items() for fault in self._check(file, self._needed(file, own))]
            if faults:
                raise self._damaged(faults)
        for file, own in jobs.items():
            self._fill(file, own)
        return differences

    def faults(self, part: tuple[int, int] = (0, 1)) -> list[str]:
        """Read this part (index, count) of all chunks; what does not fit its checksum, in words. Local."""
        every = [(file, k) for file, info in self._manifest.files.items() for k in range(len(info.chunks))]
        index, count = part
        chunks: dict[str, list[int]] = defaultdict(list)
        for file, chunk in every[len(every) * index // count : len(every) * (index + 1) // count]:
            chunks[file].append(chunk)
        return [fault for file, own in chunks.items() for fault in self._check(file, own)]

    def verify(self) -> None:
        """Read every chunk; CheckpointError that names all which do not fit their checksums. Local."""
        faults = self.faults()
        if faults:
            raise self._damaged(faults)

    def strays(self) -> list[str]:
        """Names in the folder that the manifest does not know; they are never read. Local."""
        known = {MANIFEST, *self._manifest.files}
        return sorted(path.name for path in self.path.iterdir() if path.name not in known)

    def _compare(self, shards: Sequence[Shard], strict: bool, ignore: Collection[str]) -> Differences:
        wanted = {shard.name for shard in shards}
        missing = sorted(wanted - set(self.tensors))
        unexpected = sorted(set(self.tensors) - wanted - set(ignore))
        misshapen = sorted({text for shard in shards if (text := self._misfit(shard))})
        if misshapen or (strict and (missing or unexpected)):
            found = [
                f"{title}: {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
                for title, names in [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)]
                if names
            ]
            do = "use the model and optimizer it was saved from" + ("" if misshapen else ", or load with strict off")
            raise CheckpointError(explain(f"{self.path} does not fit what is to be loaded.", "; ".join(found), do))
        return Differences(tuple(missing), tuple(unexpected))

    def _misfit(self, shard: Shard) -> str | None:
        info = self.tensors.get(shard.name)
        if info is None:
            return None
        if info.shape != shard.shape:
            return f"{shard.name} is {info.shape} in the checkpoint, {shard.shape} here"
        mine = shard.tensor.dtype
        floating = info.dtype.is_floating_point and mine.is_floating_point
        return (
            None if floating or info.dtype == mine else f"{shard.name} is {info.dtype} in the checkpoint, {mine} here"
        )

    def _plan_jobs(self, shards: Sequence[Shard]) -> dict[str, list[_Job]]:
        jobs: dict[str, list[_Job]] = defaultdict(list)
        for shard in shards:
            info = self.tensors.get(shard.name)
            if info is None:
                continue
            for stored in info.boxes:
                if overlap(stored.box, shard.box):
                    jobs[stored.file].append(_Job(shard.name, stored, info.dtype, shard.box, shard.tensor.detach()))
        return {file: sorted(own, key=lambda job: job.stored.start) for file, own in sorted(jobs.items())}

    def _span(self, file: str, chunk: int) -> tuple[int, int]:
        start = chunk * self._manifest.chunk_bytes
        return start, min(start + self._manifest.chunk_bytes, self._manifest.files[file].size)

    def _copies(self, file: str, jobs: Sequence[_Job]) -> Iterator[tuple[int, list[tuple[_Job, Box, Box]]]]:
        """Per chunk that holds something asked for: (chunk, [(job, a box contiguous in the chunk, what of it)])."""
        by_chunk: dict[int, list[_Job]] = defaultdict(list)
        for job in jobs:
            first, last = _hull(job)
            for chunk in range(first // self._manifest.chunk_bytes, (last - 1) // self._manifest.chunk_bytes + 1):
                by_chunk[chunk].append(job)
        for chunk in sorted(by_chunk):
            begin, end = self._span(file, chunk)
            copies = [(job, *pair) for job in by_chunk[chunk] for pair in _shared(job, begin, end)]
            if copies:
                yield chunk, copies

    def _needed(self, file: str, jobs: Sequence[_Job]) -> list[int]:
        return [chunk for chunk, _ in self._copies(file, jobs)]

    def _fill(self, file: str, jobs: Sequence[_Job]) -> None:
        descriptor = self._open_file(file)
        buffer = self._buffer()
        try:
            for chunk, copies in self._copies(file, jobs):
                begin, _ = self._span(file, chunk)
                fault = self._read_chunk(descriptor, file, chunk, buffer)
                if fault:
                    raise self._damaged([fault])
                for job, held, shared in copies:
                    place = _place(job, held) - begin
                    source = torch.frombuffer(buffer, dtype=job.dtype, count=held.numel, offset=place).view(held.sizes)
                    with torch.no_grad():
                        job.into[shared.slices(job.box.offsets)].copy_(source[shared.slices(held.offsets)])
        finally:
            os.close(descriptor)

    def _check(self, file: str, chunks: Sequence[int]) -> list[str]:
        rest = [chunk for chunk in chunks if (file, chunk) not in self._checked]
        if not rest:
            return []
        descriptor = self._open_file(file)
        buffer = self._buffer()
        try:
            found = [self._read_chunk(descriptor, file, chunk, buffer, verify=True) for chunk in rest]
        finally:
            os.close(descriptor)
        self._checked.update((file, chunk) for chunk, fault in zip(rest, found, strict=True) if fault is None)
        return [fault for fault in found if fault]

    def _buffer(self) -> bytearray:
        biggest = max((info.size for info in self._manifest.files.values()), default=0)
        return bytearray(min(self._manifest.chunk_bytes, biggest))

    def _read_chunk(
        self, descriptor: int, file: str, chunk: int, buffer: bytearray, *, verify: bool | None = None
    ) -> str | None:
        """Fill the buffer's beginning with a chunk; a fault in words if it is short or its checksum does not fit."""
        begin, end = self._span(file, chunk)
        view, at = memoryview(buffer)[: end - begin], begin
        try:
            while at < end:
                got = os.preadv(descriptor, [view[at - begin :]], at)
                if not got:
                    return f"{file} ends at byte {at} of {self._manifest.files[file].size}"
                at += got
        except OSError as error:
            return f"{file} cannot be read at byte {at}: {error.strerror}"
        if verify if verify is not None else self._verify:
            found, stored = zlib.crc32(view), self._manifest.files[file].chunks[chunk]
            if found != stored:
                return f"{file}, bytes {begin} to {end}: checksum {found:08x} instead of {stored:08x}"
        return None

    def _open_file(self, name: str) -> int:
        return _open_plain(self.path / name, self._manifest.files[name].size)

    def _damaged(self, faults: Sequence[str]) -> CheckpointError:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        return CheckpointError(
            explain(f"{self.path} is damaged.", "; ".join(faults[:10]) + more, "use another checkpoint of the run")
        )


def _place(job: _Job, held: Box) -> int:
    """The first byte in the file of a box that is contiguous in the job's stored box."""
    flat = 0
    for offset, origin, size in zip(held.offsets, job.stored.box.offsets, job.stored.box.sizes, strict=True):
        flat = flat * size + offset - origin
    return job.stored.start + flat * job.dtype.itemsize


def _hull(job: _Job) -> tuple[int, int]:
    """The bytes in the file from the first to the last element asked for."""
    shared = overlap(job.stored.box, job.box)
    assert shared is not None  # a job is made for a box that meets
    last = Box(tuple(stop - 1 for stop in shared.stops), (1,) * len(shared.sizes))
    return _place(job, shared), _place(job, last) + job.dtype.itemsize


def _shared(job: _Job, begin: int, end: int) -> Iterator[tuple[Box, Box]]:
    """Of a stored box's elements at bytes `begin` to `end`: (boxes contiguous in the file, what is asked of each)."""
    first, item, box = job.stored.start, job.dtype.itemsize, job.stored.box
    start = max(begin - first, 0) // item
    stop = min(end - first, box.numel * item) // item
    for piece in flat_range_to_boxes(box.sizes, start, stop):
        held = piece.shifted(box.offsets)
        shared = overlap(held, job.box)
        if shared:
            yield held, shared


def _open_plain(path: Path, size: int | None) -> int:
    """A descriptor of a regular file of that size, of no link; CheckpointError for anything else."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise _unusable(path, "a link" if stat.S_ISLNK(mode) else "no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    found = os.fstat(descriptor).st_size
    if size is not None and found != size:
        os.close(descriptor)
        raise _unusable(path, f"{found} bytes instead of {size}")
    return descriptor


def _read_manifest(folder: Path) -> bytes:
    try:
        if not folder.is_dir():
            raise _unusable(folder, "no folder" if not folder.exists() else "a file")
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _unusable(folder, str(error.strerror)) from error
    if MANIFEST not in names:
        found = "an empty folder" if not names else f"no {MANIFEST} among {', '.join(names[:5])}"
        raise _unusable(folder, found)
    with open(_open_plain(folder / MANIFEST, None), "rb") as file:
        return file.read()


def _unusable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        explain(f"{path} is not (part of) a whole checkpoint.", found, "name a folder step-NNNNNNNN of a run")
    )
