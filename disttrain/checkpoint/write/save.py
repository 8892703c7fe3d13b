"""Saves a checkpoint: each rank writes one file, then rank 0 writes the manifest and commits.

The ranks meet three times: to compare their plans with those of the previous save, to check all plans before a byte is
written, and to check all files before the commit. In addition to the state itself, one piece of one tensor is in
memory. Nothing is overwritten. If any rank fails, every rank raises the first cause, and the unfinished files are
removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from disttrain.checkpoint.form.checksum import crc32
from disttrain.checkpoint.form.manifest import (
    MANIFEST,
    FileInfo,
    Manifest,
    TensorInfo,
    checked_document,
    encode_manifest,
    rank_file,
)
from disttrain.checkpoint.form.shards import Shard, reject_invalid_shards
from disttrain.checkpoint.form.tensor_bytes import Entry, plan_file, tensor_bytes
from disttrain.checkpoint.ranks import Ranks, run_collectively
from disttrain.checkpoint.storage.durable_files import Disk
from disttrain.checkpoint.storage.interface import NewFile, Storage, storage_of
from disttrain.checkpoint.storage.location import Location, LocationT, child, step_folder
from disttrain.checkpoint.write.write_plan import choose_shards, combine_plans, plan_digest
from disttrain.errors import CheckpointError, explain

CHUNK_BYTES = 16 * 2**20
"""Bytes covered by one checksum, and the memory that a reader holds for one chunk."""


def save_checkpoint(
    root: LocationT,
    step: int,
    shards: Sequence[Shard],
    document: Mapping[str, Any],
    ranks: Ranks,
    *,
    disk: Disk | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    plans: PlanCache | None = None,
) -> LocationT:
    """Save the shards of all ranks and rank 0's document as `root/step-NNNNNNNN`, and return its location. Collective.

    When this returns, the checkpoint is intact and durable. On failure, every rank raises CheckpointError with the
    first cause, and nothing of the checkpoint remains, unless only the sync after the commit failed. `document` is a
    JSON object. Its tuples are read back as lists. With the same `plans` in consecutive saves, only the first one does
    the work that grows with ranks times tensors.
    """
    storage, target = storage_of(cast(Location, root), disk), root / step_folder(step)
    save = _Save(storage, target, step, tuple(shards), ranks, chunk_bytes, plans or PlanCache())
    failed = f"Could not save the checkpoint of step {step} to {save.target}."
    head, entries, staging, tensors = save.agree_on_plan(document, failed)
    try:
        run_collectively(
            ranks,
            lambda: save.write(staging, head, entries),
            lambda written: save.commit(staging, written, tensors, document),
            failed=failed,
        )
    except BaseException:
        if ranks.rank == 0 and not save.committed:  # all other ranks have reported their outcome, so nobody writes here
            save.storage.discard(staging.folder)
        raise
    return child(root, save.target.name)


class PlanCache:
    """The tensors that rank 0 derived from all ranks' plans, and the digests of the plans. Empty on other ranks."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._tensors: Mapping[str, TensorInfo] = {}

    def recall(self, digests: list[bytes]) -> Mapping[str, TensorInfo] | None:
        """Return the tensors if the plan of every rank is unchanged. Otherwise return None."""
        return self._tensors if digests == self._digests else None

    def keep(self, digests: list[bytes], tensors: Mapping[str, TensorInfo]) -> None:
        """Store the tensors with the digests of the plans they were derived from."""
        self._digests, self._tensors = digests, tensors


@dataclass(frozen=True)
class _WritePlan:
    """The plan of one rank: its `entries`, the `size` of its file in bytes, and a `digest` of its input.

    Entries with empty boxes only name a tensor. The size is 0 if the rank writes no file.
    """

    entries: tuple[Entry, ...]
    size: int
    digest: bytes


@dataclass(frozen=True)
class _Staging:
    folder: Location
    needed: int
    free: int | None


@dataclass(frozen=True)
class _Save:
    storage: Storage[Location]
    target: Location
    step: int
    shards: tuple[Shard, ...]
    ranks: Ranks
    chunk_bytes: int
    plans: PlanCache
    committed: list[bool] = field(default_factory=list)

    def agree_on_plan(
        self, document: Mapping[str, Any], failed: str
    ) -> tuple[bytes, list[Entry], _Staging, Mapping[str, TensorInfo]]:
        """Return this rank's file header and entries, the staging folder, and, on rank 0, all tensors.

        Collective. Rank 0 creates the staging folder.
        """
        mine: list[tuple[bytes, list[Entry], _WritePlan]] = []
        tensors: dict[str, TensorInfo] = {}
        digests: list[bytes] = []

        def plan() -> bytes:
            reject_invalid_shards(self.shards)
            entries = [Entry(s.name, s.shape, s.tensor.dtype, s.box) for s in choose_shards(self.shards)]
            metadata = {"format": "pt", "disttrain": f"step {self.step}, rank {self.ranks.rank} of {self.ranks.size}"}
            head, placed = plan_file([entry for entry in entries if entry.box.numel], metadata)
            every = (*placed, *(entry for entry in entries if not entry.box.numel))
            digest = plan_digest(self.shards, len(head))
            mine.append((head, placed, _WritePlan(every, placed[-1].stop if placed else 0, digest)))
            return digest

        def recall(found: list[bytes]) -> bool:
            digests.extend(found)
            return self.plans.recall(found) is not None

        def judge(plans: list[_WritePlan]) -> _Staging:
            known = self.plans.recall(digests)
            tensors.update(combine_plans(self.shards, [plan.entries for plan in plans]) if known is None else known)
            self.plans.keep(digests, tensors)
            checked_document(document)
            needed, free = sum(plan.size for plan in plans), self.storage.free_bytes(self.target.parent)
            try:
                if self.storage.taken(self.target):
                    problem = f"{self.target} exists already, and nothing is overwritten"
                    raise CheckpointError(explain("Cannot write the files.", problem, "move it, or save elsewhere"))
                return _Staging(self.storage.begin(self.target), needed, free)
            except OSError as error:
                raise self._write_error(error, _Staging(self.target.parent, needed, free)) from error

        known = run_collectively(self.ranks, plan, recall, failed=failed)
        head, placed, own = mine[0]
        sent = replace(own, entries=()) if known else own
        return head, placed, run_collectively(self.ranks, lambda: sent, judge, failed=failed), tensors

    def write(self, staging: _Staging, head: bytes, entries: Sequence[Entry]) -> FileInfo | None:
        """Write and sync this rank's file. Return its size and checksums, or None if it writes nothing. Local."""
        name = rank_file(self.ranks.rank)
        if not entries:
            return None
        tensors = {(shard.name, shard.box): shard.tensor for shard in self.shards}
        try:
            with self.storage.create(staging.folder / name, entries[-1].stop) as file:
                summed = _SummedFile(file, self.chunk_bytes)
                summed.write(head)
                for entry in entries:
                    for piece in tensor_bytes(tensors[entry.name, entry.box], self.chunk_bytes):
                        summed.write(piece)
                file.sync()
            self.storage.sync_folder(staging.folder)
        except OSError as error:
            raise self._write_error(error, staging) from error
        return summed.info()

    def commit(
        self,
        staging: _Staging,
        written: Sequence[FileInfo | None],
        tensors: Mapping[str, TensorInfo],
        document: Mapping[str, Any],
    ) -> None:
        """Check that all files are visible, write the manifest, and commit. Local: rank 0."""
        manifest = Manifest(
            step=self.step,
            chunk_bytes=self.chunk_bytes,
            tensors=tensors,
            files={rank_file(rank): info for rank, info in enumerate(written) if info is not None},
            document=document,
            writer={"torch": str(torch.__version__), "ranks": self.ranks.size},
        )
        try:
            for name, info in manifest.files.items():
                self._reject_absent(staging.folder / name, info.size)
            content = encode_manifest(manifest)
            with self.storage.create(staging.folder / MANIFEST, len(content)) as file:
                file.write(content)
                file.sync()
            self.storage.sync_folder(staging.folder)
            self.storage.commit(staging.folder, self.target)
            self.committed.append(True)
        except OSError as error:
            raise self._write_error(error, staging) from error

    def _reject_absent(self, path: Location, size: int) -> None:
        found = self.storage.size(path)
        if found != size:
            raise CheckpointError(
                explain(
                    f"Rank 0 does not see {path.name}, which another rank wrote.",
                    "no such file" if found is None else f"{found} bytes instead of {size}",
                    f"save to a folder in which all nodes see the same files, unlike {self.target.parent}",
                )
            )

    def _write_error(self, error: OSError, staging: _Staging) -> CheckpointError:
        problem = f"{error.strerror} ({error.filename or staging.folder}); the checkpoint needs {staging.needed} bytes"
        if staging.free is None:
            fix = (
                "check that the address exists and is reachable, and that its credentials allow list, get, put, delete"
            )
            return CheckpointError(explain("The store failed.", problem, fix))
        problem += f", {staging.free} were free before it and {self.storage.free_bytes(staging.folder)} are now"
        fix = "free disk space or set another run.dir; on several nodes, all of them must see that folder"
        return CheckpointError(explain("The disk failed.", problem, fix))


class _SummedFile:
    """Writes to a file and computes the CRC-32 of each of its chunks."""

    def __init__(self, file: NewFile, chunk_bytes: int) -> None:
        self._file, self._chunk_bytes = file, chunk_bytes
        self._done: list[int] = []
        self._sum = self._filled = 0

    def write(self, content: memoryview | bytes) -> None:
        rest = memoryview(content)
        while rest:
            piece = rest[: self._chunk_bytes - self._filled]
            self._sum = crc32(piece, self._sum)
            self._file.write(piece)
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == self._chunk_bytes:
                self._done.append(self._sum)
                self._sum = self._filled = 0

    def info(self) -> FileInfo:
        size = len(self._done) * self._chunk_bytes + self._filled
        return FileInfo(size, (*self._done, self._sum) if self._filled else tuple(self._done))
