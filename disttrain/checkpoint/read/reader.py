"""Reading a checkpoint: its manifest first, then only the chunks that hold what is asked for, each checked.

`Checkpoint` is local: no rank waits for another. Holds one chunk in memory beyond the tensors it fills. Refuses links,
paths that leave the folder, and every byte whose checksum does not fit: before a tensor is touched, or, where its owner
says so, while tensors are filled (`verify_while_loading`).
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
"""Read of a file at once for its header; a longer one takes another read."""


@dataclass(frozen=True, slots=True)
class LocatedBox:
    """A stored box, with the first byte of its row-major bytes in the file."""

    box: Box
    file: str
    start: int


@dataclass(frozen=True)
class Differences:
    """How the names asked for differ from those stored: `missing` from the checkpoint, `unexpected` in it."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class Checkpoint:
    """A committed checkpoint, on a disk or in a store. Made by `Checkpoint.open`."""

    def __init__(self, path: Location, manifest: Manifest, *, verify: bool) -> None:
        self.path = path
        self._storage: Storage[Location] = storage_of(path)
        self._manifest = manifest
        self._verify = verify
        self._checked: set[tuple[str, int]] = set()
        self._on_the_way = False
        self._headers: dict[str, tuple[Header, bytes]] = {}

    @classmethod
    def open(cls, path: str | Location, *, verify: bool = True) -> Checkpoint:
        """Read and check the manifest, and that every file is there with its size; tensors stay there. Local.

        With `verify`, every chunk read later is held against its checksum. Raises CheckpointError for whatever is no
        whole checkpoint.
        """
        path = parse_location(path)
        storage = storage_of(path)
        manifest = decode_manifest(storage.read_manifest(path), where=str(path / MANIFEST))
        for _, error in storage.unusable(path, manifest.files):
            raise error
        return cls(path, manifest, verify=verify)

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
        box = full_box(info.shape) if box is None else box
        into = torch.empty(box.sizes, dtype=info.dtype)
        shards = [Shard(name, info.shape, box, into)]
        reject_invalid_shards(shards)
        for file, jobs in self._plan_jobs(shards).items():  # memory that nobody else has: checked on the way
            self._fill(file, jobs)
        return into

    def load_into(self, shards: Sequence[Shard], *, strict: bool = True, ignore: Collection[str] = ()) -> Differences:
        """Copy what is stored into the shards' tensors, whatever boxes it was saved in. Local.

        Nothing is written before all names and shapes fit (`judge`) and every chunk needed was found right (`check`);
        after `verify_while_loading` it is read and checked at once. Raises CheckpointError for what does not fit,
        DamagedError for bytes that do not.
        """
        differences = self.check_fit(shards, strict=strict, ignore=ignore)
        self.check(shards)
        for file, jobs in self._plan_jobs(shards).items():
            self._fill(file, jobs)
        return differences

    def check_fit(self, shards: Sequence[Shard], *, strict: bool = True, ignore: Collection[str] = ()) -> Differences:
        """Whether these shards can be filled, by names, shapes and dtypes. Local; reads no tensor.

        `strict` refuses missing names, and stored ones that no shard asks for, but for those in `ignore`. Floating
        dtypes are converted to the shard's; any other change of dtype is refused. Raises CheckpointError with all
        missing, unexpected and misshapen names.
        """
        reject_invalid_shards(shards)
        return self._compare(shards, strict, ignore)

    def check(self, shards: Sequence[Shard]) -> None:
        """Read every chunk that these shards need and that is not known to be right; DamagedError. Local.

        Without `verify`, and after `verify_while_loading`, it does nothing.
        """
        if not self._verify or self._on_the_way:
            return
        size = self._manifest.chunk_bytes
        needed = {
            file: {chunk for chunk, _ in plan_copies(jobs, size)} | set(self._header_chunks(file))
            for file, jobs in self._plan_jobs(shards).items()
        }
        self.verify(merge_chunks((file, chunk) for file, chunks in needed.items() for chunk in chunks))

    def locate(self, name: str, box: Box | None = None) -> list[LocatedBox]:
        """A tensor's stored boxes, or those that meet a box, with their first bytes. Reads headers. Local."""
        info = self.tensors[name]
        return [self._locate_box(name, info, one) for one in (info.boxes if box is None else info.overlapping(box))]

    def verify_while_loading(self) -> None:
        """From here on `load_into` reads what it needs once, straight to its tensors, and checks it as it comes.

        For tensors that nobody uses before all is known to be whole: what they hold after a DamagedError is no state.
        """
        self._on_the_way = True

    @property
    def checked(self) -> list[ChunkRange]:
        """The chunks that this process has found right. Local."""
        return merge_chunks(self._checked)

    def verify(self, runs: Sequence[ChunkRange] | None = None) -> None:
        """Read these chunks, or all; DamagedError that names those which do not fit their checksums. Local."""
        chosen = merge_chunks(all_chunks(self._manifest.files)) if runs is None else runs
        faults = [fault for file, first, stop in chosen for fault in self._check(file, range(first, stop))]
        if faults:
            raise self._damaged(faults)

    def strays(self) -> list[str]:
        """Names in the folder that the manifest does not know; they are never read. Local."""
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
            do = "use the model and optimizer it was saved from"
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

    def _plan_jobs(self, shards: Sequence[Shard]) -> dict[str, list[FillTask]]:
        jobs: dict[str, list[FillTask]] = defaultdict(list)
        for shard in shards:
            info = self.tensors.get(shard.name)
            if info is None:
                continue
            for stored in self.locate(shard.name, shard.box):
                job = FillTask(stored.box, stored.start, info.dtype, shard.box, shard.tensor.detach())
                jobs[stored.file].append(job)
        return {file: sorted(own, key=lambda job: job.start) for file, own in sorted(jobs.items())}

    def _locate_box(self, name: str, info: TensorInfo, stored: StoredBox) -> LocatedBox:
        if stored.start is not None:
            return LocatedBox(stored.box, stored.file, stored.start)
        try:
            start = self._header(stored.file).start(name, info.shape, info.dtype, stored.box)
            return LocatedBox(stored.box, stored.file, start)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged([f"the header of {stored.file} does not fit the manifest: {error}"]) from None

    def _header(self, file: str) -> Header:
        """The header of a file. ValueError where it is none.

        Read by itself, for it says where all else is; whatever sums the chunks it lies in holds it against them.
        """
        if file not in self._headers:
            size = self._manifest.files[file].size
            with self._open(file) as reader:
                text = self._bytes(reader, 0, min(size, _MOST_HEADERS))
                length = int.from_bytes(text[:8], "little")
                if not 0 < length <= size - 8:
                    raise ValueError(f"{length} bytes of a header in a file of {size}")
                text += self._bytes(reader, len(text), 8 + length)
            text = text[: 8 + length]
            self._headers[file] = Header(text[8:], size), text
        return self._headers[file][0]

    def _header_chunks(self, file: str) -> range:
        """The chunks that a file's header lies in, if it was read."""
        text = self._headers[file][1] if file in self._headers else b""
        return range(-(-len(text) // self._manifest.chunk_bytes))

    def _bytes(self, reader: ChunkReader, begin: int, end: int) -> bytes:
        """A file's bytes from `begin` to `end`, not summed."""
        found = bytearray(max(0, end - begin))
        fault = reader.fill(memoryview(found), begin)
        if fault:
            raise self._damaged([fault])
        return bytes(found)

    def _check(self, file: str, chunks: Iterable[int]) -> list[str]:
        """Faults of these chunks, in words. Chunks found right once are not read again."""
        rest = [chunk for chunk in chunks if (file, chunk) not in self._checked]
        if not rest:
            return []
        with self._open(file) as reader:
            return [fault for chunk in rest if (fault := self._take(reader, chunk, []))]

    def _fill(self, file: str, jobs: Sequence[FillTask]) -> None:
        with self._open(file) as reader, torch.no_grad():
            for chunk, copies in plan_copies(jobs, self._manifest.chunk_bytes):
                direct, through = split_direct(copies, self._is_known(file, chunk))
                begin, end = reader.span(chunk)
                if reader.requests_are_slow and [len(view) for _, view in direct] != [end - begin]:
                    direct, through = [], copies  # one that is a whole chunk goes straight, else the chunk is asked for
                fault = None
                if direct:
                    fault = self._take(reader, chunk, [(copy.first, view) for copy, view in direct])
                if through and not fault:
                    fault = self._take(reader, chunk, [(begin, memoryview(reader.buffer)[: end - begin])])
                for copy, _ in direct:
                    torch.autograd.graph.increment_version(copy.job.into)  # torch has not seen it change
                if fault:
                    raise self._damaged([fault])
                for copy in through:
                    copy.perform(reader.buffer, begin)
            if self._verify:  # by what it said all was placed
                faults = self._check(file, self._header_chunks(file))
                if faults:
                    raise self._damaged(faults)

    def _is_known(self, file: str, chunk: int) -> bool:
        return not self._verify or (file, chunk) in self._checked

    def _take(self, reader: ChunkReader, chunk: int, places: Sequence[tuple[int, memoryview]]) -> str | None:
        """Parts of a chunk to their places, and of one that is not known all held against its checksum, with what of
        the header lies in it; a fault in words, as `ChunkReader.scatter`."""
        if self._is_known(reader.name, chunk):
            return reader.scatter(chunk, places, verify=False)
        begin, end = reader.span(chunk)
        header = self._headers[reader.name][1][begin:end] if reader.name in self._headers else b""
        whole_chunk = bool(places) and places[0][0] == begin
        seen = places[0][1] if whole_chunk else memoryview(bytearray(len(header)))
        if header and not whole_chunk:
            places = [(begin, seen), *places]
        fault = reader.scatter(chunk, places, verify=True)
        if fault is None and seen[: len(header)] != header:
            fault = f"{reader.name}, its header: read twice, and not the same"
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
