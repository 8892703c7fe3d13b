"""Plans which shards each rank writes and combines all ranks' plans into the tensors of a checkpoint. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256

import torch

from disttrain.checkpoint.form.boxes import tiling_fault
from disttrain.checkpoint.form.grid import find_grid
from disttrain.checkpoint.form.manifest import StoredBox, TensorInfo, rank_file
from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.form.tensor_bytes import Entry, dtype_name
from disttrain.errors import CheckpointError, explain


def choose_shards(shards: Sequence[Shard]) -> list[Shard]:
    """Return the shards that this rank writes: those it alone holds, and an equal part of those that others hold too.

    Every holder computes the same division without communication. Among tensors with the same number of holders, the
    largest come first, and each is assigned to the holder with the least load. The load is the global size, which is
    equal on all holders whatever their boxes are.
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
    """Return the digest of everything that a rank's plan, and its contribution to the tensors, depends on. Pure."""
    content = [(s.name, s.shape, s.tensor.dtype, s.box.offsets, s.box.sizes, s.replica) for s in shards]
    return sha256(repr((content, head_bytes)).encode()).digest()


def combine_plans(shards: Sequence[Shard], plans: Sequence[Sequence[Entry]]) -> dict[str, TensorInfo]:
    """Combine the entries of all ranks into tensors. `shards` are rank 0's, which also name tensors without elements.

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
        fix = "fix the strategy that made these shards"
        raise CheckpointError(explain("The shards of the ranks are inconsistent.", "; ".join(faults[:5]) + more, fix))
    return found


def _disagreement(name: str, held: Sequence[tuple[int, Entry]]) -> str | None:
    first_rank, first = held[0]
    dtype_name(first.dtype)
    for rank, entry in held:
        if entry.dtype != first.dtype or entry.shape != first.shape:
            here, there = f"{first.dtype} {first.shape}", f"{entry.dtype} {entry.shape}"
            return f"{name} is {here} on rank {first_rank} but {there} on rank {rank}"
    return None
