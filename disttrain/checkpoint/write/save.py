"""Writing a checkpoint: each rank its own file, the manifest last, one commit.

The ranks meet to say whether they are cut as at the save before, to have all plans judged before a byte is written,
and all files before the commit. Holds one piece of one tensor at a time beyond the state itself. Refuses an existing
name; leaves nothing behind when it fails.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, cast

import torch

from disttrain.checkpoint.form.boxes import tiling_fault
from disttrain.checkpoint.form.checksum import crc32
from disttrain.checkpoint.form.grid import find_grid
from disttrain.checkpoint.form.manifest import (
    MANIFEST,
    FileInfo,
    Manifest,
    StoredBox,
    TensorInfo,
    checked_document,
    encode_manifest,
    rank_file,
)
from disttrain.checkpoint.form.shards import Ranks, Shard, refuse_bad_shards, take_step
from disttrain.checkpoint.form.tensor_bytes import Entry, dtype_name, plan_file, tensor_bytes
from disttrain.checkpoint.storage.address import Place, PlaceT, below, step_folder
from disttrain.checkpoint.storage.disk import Disk
from disttrain.checkpoint.storage.storage import NewFile, Storage, storage_of
from disttrain.errors import CheckpointError, explain

CHUNK_BYTES = 16 * 2**20
"""What one checksum covers, and what a reader holds in memory."""


def save_checkpoint(
    root: PlaceT,
    step: int,
    shards: Sequence[Shard],
    document: Mapping[str, Any],
    ranks: Ranks,
    *,
    disk: Disk | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    plans: PlanMemory | None = None,
) -> PlaceT:
    """Save all ranks' shards and rank 0's document as `root/step-NNNNNNNN`; returns that place. Collective.

    When it returns, the checkpoint is whole and durable; when it raises CheckpointError (on every rank, with the
    first cause), nothing of it is left, unless only the sync after the commit failed. `document` is a JSON object;
    tuples in it come back as lists. `plans`, given to one save after the other, spares all but the first what
    grows with ranks times tensors.
    """
    storage, target = storage_of(cast(Place, root), disk), root / step_folder(step)
    save = _Save(storage, target, step, tuple(shards), ranks, chunk_bytes, plans or PlanMemory())
    asked = f"The checkpoint of step {step} could not be saved to {save.target}."
    head, entries, staging, tensors = save.agree_on_plan(document, asked)
    try:
        take_step(
            ranks,
            lambda: save.write(staging, head, entries),
            lambda written: save.commit(staging, written, tensors, document),
            asked=asked,
        )
    except BaseException:
        if ranks.rank == 0 and not save.committed:  # every other rank has told how it ended: nobody writes here
            save.storage.discard(staging.folder)
        raise
    return below(root, save.target.name)


class PlanMemory:
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
    folder: Place
    needed: int
    free: int | None


@dataclass(frozen=True)
class _Save:
    storage: Storage[Place]
    target: Place
    step: int
    shards: tuple[Shard, ...]
    ranks: Ranks
    chunk_bytes: int
    plans: PlanMemory
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
            refuse_bad_shards(self.shards)
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
            tensors.update(judge_tensors(self.shards, [plan.entries for plan in plans]) if known is None else known)
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

        known = take_step(self.ranks, plan, recall, asked=asked)
        head, placed, own = mine[0]
        brought = replace(own, entries=()) if known else own
        return head, placed, take_step(self.ranks, lambda: brought, judge, asked=asked), tensors

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

    def _refuse_absent(self, path: Place, size: int) -> None:
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


def choose_shards(shards: Sequence[Shard]) -> list[Shard]:
    """Those of a rank's shards that it writes: all it holds alone, and its even share of what others hold too.

    Every holder comes to the same division without asking: among tensors with the same number of holders, biggest
    first, each goes to the least loaded. Weighed by the global size, which is the same on all holders whatever their
    boxes are.
    """
    chosen = [shard for shard in shards if shard.replica[1] == 1]
    shared: dict[int, list[Shard]] = defaultdict(list)
    for shard in shards:
        if shard.replica[1] > 1:
            shared[shard.replica[1]].append(shard)
    for count, group in shared.items():
        load = [0] * count
        for shard in sorted(group, key=lambda s: (-torch.Size(s.shape).numel(), s.name, s.box.offsets)):
            writer = load.index(min(load))
            load[writer] += torch.Size(shard.shape).numel() * shard.tensor.dtype.itemsize
            if writer == shard.replica[0]:
                chosen.append(shard)
    return chosen


def plan_digest(shards: Sequence[Shard], head_bytes: int) -> bytes:
    """Of all that a rank's plan, and what rank 0 makes of it, come from. Pure."""
    told = [(s.name, s.shape, s.tensor.dtype, s.box.offsets, s.box.sizes, s.replica) for s in shards]
    return sha256(repr((told, head_bytes)).encode()).digest()


def judge_tensors(shards: Sequence[Shard], plans: Sequence[Sequence[Entry]]) -> dict[str, TensorInfo]:
    """What all ranks' entries make of each tensor; `shards` are rank 0's, which names those without elements too.

    Raises CheckpointError unless the boxes tile every tensor and the ranks agree on its shape and dtype.
    """
    found = {s.name: TensorInfo(s.shape, s.tensor.dtype) for s in shards if not torch.Size(s.shape).numel()}
    tensors: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
    for rank, entries in enumerate(plans):
        for entry in entries:
            tensors[entry.name].append((rank, entry))
    faults = []
    for name, held in tensors.items():
        fault = _disagreement(name, held)
        boxes = {entry.box: rank for rank, entry in held if entry.box.numel}
        shape, dtype = held[0][1].shape, held[0][1].dtype
        grid = None if fault else find_grid(shape, boxes)
        if grid is not None and len(boxes) == sum(1 for _, entry in held if entry.box.numel):
            found[name] = TensorInfo(shape, dtype, grid=grid)
            continue
        if fault is None and (tiling := tiling_fault(shape, [entry.box for _, entry in held])):
            fault = f"{name}: {tiling} (ranks {', '.join(str(rank) for rank, _ in held[:8])})"
        if fault:
            faults.append(fault)
        listed = [StoredBox(entry.box, rank_file(rank), entry.start) for rank, entry in held if entry.box.numel]
        found[name] = TensorInfo(shape, dtype, tuple(listed))
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        do = "mend the strategy that made these shards"
        raise CheckpointError(explain("the ranks' shards do not fit together.", "; ".join(faults[:5]) + more, do))
    return found


def _disagreement(name: str, held: Sequence[tuple[int, Entry]]) -> str | None:
    first_rank, first = held[0]
    dtype_name(first.dtype)
    for rank, entry in held:
        if entry.dtype != first.dtype or entry.shape != first.shape:
            here, there = f"{first.dtype} {first.shape}", f"{entry.dtype} {entry.shape}"
            return f"{name} is {here} on rank {first_rank} but {there} on rank {rank}"
    return None


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
