"""Writing a checkpoint: each rank its own file, the manifest last, one commit.

The ranks meet to say whether they are cut as at the save before, to have all plans judged before a byte is written,
and all files before the commit. Holds one piece of one tensor at a time beyond the state itself. Refuses an existing
name; leaves nothing behind when it fails.
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
"""What one checksum covers, and what a reader holds in memory."""


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
    """Save all ranks' shards and rank 0's document as `root/step-NNNNNNNN`; returns that place. Collective.

    When it returns, the checkpoint is whole and durable; when it raises CheckpointError (on every rank, with the
    first cause), nothing of it is left, unless only the sync after the commit failed. `document` is a JSON object;
    tuples in it come back as lists. `plans`, given to one save after the other, spares all but the first what
    grows with ranks times tensors.
    """
    storage, target = storage_of(cast(Location, root), disk), root / step_folder(step)
    save = _Save(storage, target, step, tuple(shards), ranks, chunk_bytes, plans or PlanCache())
    asked = f"The checkpoint of step {step} could not be saved to {save.target}."
    head, entries, staging, tensors = save.agree_on_plan(document, asked)
    try:
        run_collectively(
            ranks,
            lambda: save.write(staging, head, entries),
            lambda written: save.commit(staging, written, tensors, document),
            failed=asked,
        )
    except BaseException:
        if ranks.rank == 0 and not save.committed:  # every other rank has told how it ended: nobody writes here
            save.storage.discard(staging.folder)
        raise
    return child(root, save.target.name)


class PlanCache:
    """What rank 0 made of all ranks' plans, and by which digests it knows them again. Empty on the other ranks."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._tensors: Mapping[str, TensorInfo] = {}

    def recall(self, digests: list[bytes]) -> Mapping[str, TensorInfo] | None:
        """All tensors, if every rank's plan is what it was; None if not."""
        return self._tensors if digests == self._digests else None

    def keep(self, digests: list[bytes], tensors: Mapping[str, TensorInfo]) -> None:
        """Know these again."""
        self._digests, self._tensors = digests, tensors


@dataclass(frozen=True)
class _Plan:
    """What one rank means to write: `entries` (empty boxes: only named), `size` its file's bytes, 0 for no file.

    `digest` is that of all it is made from.
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
        self, document: Mapping[str, Any], asked: str
    ) -> tuple[bytes, list[Entry], _Staging, Mapping[str, TensorInfo]]:
        """This rank's head and placed entries, the staging folder that rank 0 made, and, there, all tensors.

        Collective.
        """
        mine: list[tuple[bytes, list[Entry], _Plan]] = []
        tensors: dict[str, TensorInfo] = {}
        digests: list[bytes] = []

        def plan() -> bytes:
            reject_invalid_shards(self.shards)
            entries = [Entry(s.name, s.shape, s.tensor.dtype, s.box) for s in choose_shards(self.shards)]
            metadata = {"format": "pt", "disttrain": f"step {self.step}, rank {self.ranks.rank} of {self.ranks.size}"}
            head, placed = plan_file([entry for entry in entries if entry.box.numel], metadata)
            every = (*placed, *(entry for entry in entries if not entry.box.numel))
            digest = plan_digest(self.shards, len(head))
            mine.append((head, placed, _Plan(every, placed[-1].stop if placed else 0, digest)))
            return digest

        def recall(found: list[bytes]) -> bool:
            digests.extend(found)
            return self.plans.recall(found) is not None

        def judge(plans: list[_Plan]) -> _Staging:
            known = self.plans.recall(digests)
            tensors.update(combine_plans(self.shards, [plan.entries for plan in plans]) if known is None else known)
            self.plans.keep(digests, tensors)
            checked_document(document)
            needed, free = sum(plan.size for plan in plans), self.storage.free_bytes(self.target.parent)
            try:
                if self.storage.taken(self.target):
                    do = "move it away, or save elsewhere"
                    raise CheckpointError(explain("nothing is overwritten.", f"{self.target} exists already", do))
                return _Staging(self.storage.begin(self.target), needed, free)
            except OSError as error:
                raise self._refusal(error, _Staging(self.target.parent, needed, free)) from error

        known = run_collectively(self.ranks, plan, recall, failed=asked)
        head, placed, own = mine[0]
        brought = replace(own, entries=()) if known else own
        return head, placed, run_collectively(self.ranks, lambda: brought, judge, failed=asked), tensors

    def write(self, staging: _Staging, head: bytes, entries: Sequence[Entry]) -> FileInfo | None:
        """This rank's file, synced; its size and checksums, None where it writes nothing. Local."""
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
            raise self._refusal(error, staging) from error
        return summed.info()

    def commit(
        self,
        staging: _Staging,
        written: Sequence[FileInfo | None],
        tensors: Mapping[str, TensorInfo],
        document: Mapping[str, Any],
    ) -> None:
        """Rank 0: check that all files are here, write the manifest, commit. Local."""
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
                self._refuse_absent(staging.folder / name, info.size)
            content = encode_manifest(manifest)
            with self.storage.create(staging.folder / MANIFEST, len(content)) as file:
                file.write(content)
                file.sync()
            self.storage.sync_folder(staging.folder)
            self.storage.commit(staging.folder, self.target)
            self.committed.append(True)
        except OSError as error:
            raise self._refusal(error, staging) from error

    def _refuse_absent(self, path: Location, size: int) -> None:
        found = self.storage.size(path)
        if found != size:
            raise CheckpointError(
                explain(
                    f"rank 0 does not see what another rank wrote as {path.name}.",
                    "no such file" if found is None else f"{found} bytes instead of {size}",
                    f"put checkpoints where all nodes see the same files ({self.target.parent} is not such a place)",
                )
            )

    def _refusal(self, error: OSError, staging: _Staging) -> CheckpointError:
        found = f"{error.strerror} ({error.filename or staging.folder}); the checkpoint needs {staging.needed} bytes"
        if staging.free is None:
            do = "see that the address exists and is reachable, and that its credentials may list, get, put and delete"
            return CheckpointError(explain("the store refused.", found, do))
        found += f", {staging.free} were free before it and {self.storage.free_bytes(staging.folder)} are now"
        do = "make room or name another run.dir; on several nodes it must be a folder that all of them see"
        return CheckpointError(explain("the disk refused.", found, do))


class _SummedFile:
    """Writes through to a file and keeps the crc32 of each chunk of it."""

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
