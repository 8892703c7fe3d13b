"""Reads a checkpoint: first the manifest, then only the chunks that hold requested tensors, each verified.

All methods of `Checkpoint` are local: no rank waits for another. In addition to the tensors that it fills, it holds one
chunk in memory. Links, paths outside the folder, and bytes that differ from their checksum are rejected. By default
they are rejected before a tensor is changed. After `verify_while_loading`, they are rejected while tensors are filled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, full_box
from disttrain.checkpoint.form.manifest import MANIFEST, Manifest, StoredBox, TensorInfo, decode_manifest
from disttrain.checkpoint.form.shards import Shard, reject_invalid_shards
from disttrain.checkpoint.form.tensor_bytes import Header
from disttrain.checkpoint.read.chunk_ranges import ChunkRange, all_chunks, merge_chunks
from disttrain.checkpoint.read.copy_plan import FillTask, plan_copies, split_direct
from disttrain.checkpoint.storage.chunk_reader import ChunkReader
from disttrain.checkpoint.storage.interface import Storage, storage_of
from disttrain.checkpoint.storage.location import Location, parse_location
from disttrain.errors import CheckpointError, DamagedError, explain

_MOST_HEADERS = 64 * 2**10
"""Bytes read from a file at once for its header. A longer header takes a second read."""


@dataclass(frozen=True, slots=True)
class LocatedBox:
    """A stored box and the offset of its first byte in the file. Its bytes are in row-major order."""

    box: Box
    file: str
    start: int


@dataclass(frozen=True)
class Differences:
    """The differences between requested and stored names: `missing` in the checkpoint, or `unexpected` in it."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class Checkpoint:
    """A committed checkpoint on a disk or in an object store. `Checkpoint.open` creates it."""

    def __init__(self, path: Location, manifest: Manifest, *, verify: bool) -> None:
        self.path = path
        self._storage: Storage[Location] = storage_of(path)
        self._manifest = manifest
        self._verify = verify
        self._checked: set[tuple[str, int]] = set()
        self._verifies_while_loading = False
        self._headers: dict[str, tuple[Header, bytes]] = {}

    @classmethod
    def open(cls, path: str | Location, *, verify: bool = True) -> Checkpoint:
        """Read and check the manifest, and check that every file exists with its size. Reads no tensor. Local.

        With `verify`, every chunk that is read later is compared with its checksum. Raises CheckpointError for anything
        that is not an intact checkpoint.
        """
        path = parse_location(path)
        storage = storage_of(path)
        manifest = decode_manifest(storage.read_manifest(path), where=str(path / MANIFEST))
        for _, error in storage.unusable(path, manifest.files):
            raise error
        return cls(path, manifest, verify=verify)

    @property
    def step(self) -> int:
        """The number of optimizer steps completed before the save."""
        return self._manifest.step

    @property
    def document(self) -> dict[str, Any]:
        """The engine's JSON object."""
        return dict(self._manifest.document)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The stored tensors by name."""
        return self._manifest.tensors

    @property
    def manifest(self) -> Manifest:
        """The decoded manifest."""
        return self._manifest

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return a tensor, or one box of it, in host memory. Local."""
        if name not in self.tensors:
            near = [other for other in self.tensors if other.split("/")[-1] == name.split("/")[-1]][:5]
            problem = f"it has {len(self.tensors)} other tensors" + (f", such as {', '.join(near)}" if near else "")
            raise CheckpointError(explain(f"{self.path} has no tensor {name}.", problem, "use a name in `tensors`"))
        info = self.tensors[name]
        box = full_box(info.shape) if box is None else box
        into = torch.empty(box.sizes, dtype=info.dtype)
        shards = [Shard(name, info.shape, box, into)]
        reject_invalid_shards(shards)
        for file, tasks in self._plan_tasks(shards).items():  # nobody else uses this memory: verified during the copy
            self._fill(file, tasks)
        return into

    def load_into(self, shards: Sequence[Shard], *, strict: bool = True, ignore: Collection[str] = ()) -> Differences:
        """Copy stored values into the tensors of shards, whatever boxes they were saved in. Local.

        By default, no tensor is changed before all names and shapes fit (`check_fit`) and every needed chunk is
        verified (`check`). After `verify_while_loading`, chunks are read and verified once, while tensors are filled.
        Raises CheckpointError for shards that do not fit, and DamagedError for damaged bytes.
        """
        differences = self.check_fit(shards, strict=strict, ignore=ignore)
        self.check(shards)
        for file, tasks in self._plan_tasks(shards).items():
            self._fill(file, tasks)
        return differences

    def check_fit(self, shards: Sequence[Shard], *, strict: bool = True, ignore: Collection[str] = ()) -> Differences:
        """Check that the shards can be filled, by names, shapes and dtypes. Reads no tensor. Local.

        `strict` rejects missing names, and stored names that no shard requests, except those in `ignore`.
        Floating-point values are converted to the shard's dtype. Any other change of dtype is rejected. The
        CheckpointError lists the missing, unexpected and misshapen names.
        """
        reject_invalid_shards(shards)
        return self._compare(shards, strict, ignore)

    def check(self, shards: Sequence[Shard]) -> None:
        """Read and verify every chunk that the shards need and that is not yet verified. Local.

        Raises DamagedError. Does nothing without `verify` or after `verify_while_loading`.
        """
        if not self._verify or self._verifies_while_loading:
            return
        size = self._manifest.chunk_bytes
        needed = {
            file: {chunk for chunk, _ in plan_copies(tasks, size)} | set(self._header_chunks(file))
            for file, tasks in self._plan_tasks(shards).items()
        }
        self.verify(merge_chunks((file, chunk) for file, chunks in needed.items() for chunk in chunks))

    def locate(self, name: str, box: Box | None = None) -> list[LocatedBox]:
        """Return the positions of a tensor's stored boxes, or of those that overlap `box`. Reads headers. Local."""
        info = self.tensors[name]
        return [self._locate_box(name, info, one) for one in (info.boxes if box is None else info.overlapping(box))]

    def verify_while_loading(self) -> None:
        """Make every later `load_into` read its bytes once, directly into the tensors, and verify them meanwhile.

        Use it for tensors that nobody reads before the complete checkpoint is verified. After a DamagedError, their
        content is undefined.
        """
        self._verifies_while_loading = True

    @property
    def checked(self) -> list[ChunkRange]:
        """The chunks that this process has verified. Local."""
        return merge_chunks(self._checked)

    def verify(self, runs: Sequence[ChunkRange] | None = None) -> None:
        """Read and verify these chunks, or all. DamagedError names the chunks with another checksum. Local."""
        chosen = merge_chunks(all_chunks(self._manifest.files)) if runs is None else runs
        faults = [fault for file, first, stop in chosen for fault in self._check(file, range(first, stop))]
        if faults:
            raise self._damaged(faults)

    def strays(self) -> list[str]:
        """Return the names in the folder that the manifest does not list. They are never read. Local."""
        known = {MANIFEST, *self._manifest.files}
        return [name for name in self._storage.names(self.path) if name not in known]

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
            fix = "use the model and optimizer from which it was saved"
            raise CheckpointError(explain(f"Cannot load {self.path}.", "; ".join(found), fix))
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

    def _plan_tasks(self, shards: Sequence[Shard]) -> dict[str, list[FillTask]]:
        tasks: dict[str, list[FillTask]] = defaultdict(list)
        for shard in shards:
            info = self.tensors.get(shard.name)
            if info is None:
                continue
            for stored in self.locate(shard.name, shard.box):
                task = FillTask(stored.box, stored.start, info.dtype, shard.box, shard.tensor.detach())
                tasks[stored.file].append(task)
        return {file: sorted(own, key=lambda task: task.start) for file, own in sorted(tasks.items())}

    def _locate_box(self, name: str, info: TensorInfo, stored: StoredBox) -> LocatedBox:
        if stored.start is not None:
            return LocatedBox(stored.box, stored.file, stored.start)
        try:
            start = self._header(stored.file).start(name, info.shape, info.dtype, stored.box)
            return LocatedBox(stored.box, stored.file, start)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged([f"the header of {stored.file} does not fit the manifest: {error}"]) from None

    def _header(self, file: str) -> Header:
        """Return a file's header. Raises ValueError for an invalid header.

        The header is read first and without a checksum, because it gives the position of everything else. When one of
        its chunks is verified, the bytes used here are compared with the verified bytes.
        """
        if file not in self._headers:
            size = self._manifest.files[file].size
            with self._open(file) as reader:
                text = self._bytes(reader, 0, min(size, _MOST_HEADERS))
                length = int.from_bytes(text[:8], "little")
                if not 0 < length <= size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
                text += self._bytes(reader, len(text), 8 + length)
            text = text[: 8 + length]
            self._headers[file] = Header(text[8:], size), text
        return self._headers[file][0]

    def _header_chunks(self, file: str) -> range:
        """Return the chunks that contain a file's header, if the header was read."""
        text = self._headers[file][1] if file in self._headers else b""
        return range(-(-len(text) // self._manifest.chunk_bytes))

    def _bytes(self, reader: ChunkReader, begin: int, end: int) -> bytes:
        """Return a file's bytes from `begin` to `end`, without a checksum."""
        found = bytearray(max(0, end - begin))
        fault = reader.fill(memoryview(found), begin)
        if fault:
            raise self._damaged([fault])
        return bytes(found)

    def _check(self, file: str, chunks: Iterable[int]) -> list[str]:
        """Return the problems of these chunks in words. Verified chunks are not read again."""
        rest = [chunk for chunk in chunks if (file, chunk) not in self._checked]
        if not rest:
            return []
        with self._open(file) as reader:
            return [fault for chunk in rest if (fault := self._take(reader, chunk, []))]

    def _fill(self, file: str, tasks: Sequence[FillTask]) -> None:
        with self._open(file) as reader, torch.no_grad():
            for chunk, copies in plan_copies(tasks, self._manifest.chunk_bytes):
                direct, buffered = split_direct(copies, self._is_known(file, chunk))
                begin, end = reader.span(chunk)
                if reader.requests_are_slow and [len(view) for _, view in direct] != [end - begin]:
                    # Only a view of the complete chunk is filled directly. Otherwise one request reads the chunk.
                    direct, buffered = [], copies
                fault = None
                if direct:
                    fault = self._take(reader, chunk, [(copy.first, view) for copy, view in direct])
                if buffered and not fault:
                    fault = self._take(reader, chunk, [(begin, memoryview(reader.buffer)[: end - begin])])
                for copy, _ in direct:
                    torch.autograd.graph.increment_version(copy.task.into)  # torch did not see the change
                if fault:
                    raise self._damaged([fault])
                for copy in buffered:
                    copy.perform(reader.buffer, begin)
            if self._verify:  # the header gave all positions
                faults = self._check(file, self._header_chunks(file))
                if faults:
                    raise self._damaged(faults)

    def _is_known(self, file: str, chunk: int) -> bool:
        return not self._verify or (file, chunk) in self._checked

    def _take(self, reader: ChunkReader, chunk: int, targets: Sequence[tuple[int, memoryview]]) -> str | None:
        """Read parts of a chunk into their targets. Return the problem in words, as `ChunkReader.scatter`.

        A chunk that is not yet verified is read completely and compared with its checksum. The part of the header in
        the chunk is compared with the header that was used.
        """
        if self._is_known(reader.name, chunk):
            return reader.scatter(chunk, targets, verify=False)
        begin, end = reader.span(chunk)
        header = self._headers[reader.name][1][begin:end] if reader.name in self._headers else b""
        from_start = bool(targets) and targets[0][0] == begin
        seen = targets[0][1] if from_start else memoryview(bytearray(len(header)))
        if header and not from_start:
            targets = [(begin, seen), *targets]
        fault = reader.scatter(chunk, targets, verify=True)
        if fault is None and seen[: len(header)] != header:
            fault = f"{reader.name}: its header was read twice and differed"
        if fault is None:
            self._checked.add((reader.name, chunk))
        return fault

    def _open(self, file: str) -> AbstractContextManager[ChunkReader]:
        return self._storage.open_chunks(self.path / file, self._manifest.files[file], self._manifest.chunk_bytes)

    def _damaged(self, faults: Sequence[str]) -> DamagedError:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        return DamagedError(
            explain(f"{self.path} is damaged.", "; ".join(faults[:10]) + more, "use another checkpoint of the run")
        )
