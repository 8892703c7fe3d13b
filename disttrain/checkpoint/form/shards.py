"""Defines shards, the parts of tensors that a rank passes to a save or a load, and checks them. Pure.

A tensor's name has the form `KIND/OWNER/NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, full_box
from disttrain.errors import CheckpointError, explain

KINDS = ("model", "optim", "objective", "ema", "user")


@dataclass(frozen=True)
class Shard:
    """One box of one tensor, as held by this rank.

    `tensor` has the shape `box.sizes`. A load writes into it. `replica` is the index of this holder and the number of
    holders of the same box. A rank names every tensor of the checkpoint that it takes part in. The box is empty if it
    holds no element.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    replica: tuple[int, int] = (0, 1)


def full_shard(name: str, tensor: Tensor, replica: tuple[int, int] = (0, 1)) -> Shard:
    """Return the shard of a tensor that this rank holds completely."""
    return Shard(name, tuple(tensor.shape), full_box(tensor.shape), tensor, replica)


def name_fault(name: str) -> str | None:
    """Describe the problem with a tensor's name, or return None for a valid name."""
    kind, owner, rest = [*name.split("/", 2), "", ""][:3]
    if kind not in KINDS:
        return f"{name!r} does not begin with one of {', '.join(kind + '/' for kind in KINDS)}"
    return None if owner and rest else f"{name!r} is not of the form KIND/OWNER/NAME"


def shard_fault(shard: Shard) -> str | None:
    """Describe the problem with a single shard, or return None for a valid shard."""
    fault = name_fault(shard.name)
    if fault:
        return fault
    index, count = shard.replica
    if not 0 <= index < count:
        return f"{shard.name}: replica {index} of {count} holders does not exist"
    outside = shard.box.numel and any(map(int.__gt__, shard.box.stops, shard.shape))
    if len(shard.box.sizes) != len(shard.shape) or outside:
        return f"{shard.name}: box {shard.box} is not inside shape {shard.shape}"
    if tuple(shard.tensor.shape) != shard.box.sizes:
        return f"{shard.name}: a tensor of shape {tuple(shard.tensor.shape)} for box {shard.box}"
    if shard.tensor.is_meta:
        return f"{shard.name}: a tensor on the meta device, which holds no values"
    return None


def reject_invalid_shards(shards: Sequence[Shard]) -> None:
    """Raise CheckpointError with all problems of single shards and with boxes that occur twice. Local."""
    faults = [fault for fault in map(shard_fault, shards) if fault]
    seen: set[tuple[str, Box]] = set()
    for shard in shards:
        if shard.box.numel and (shard.name, shard.box) in seen:
            faults.append(f"{shard.name}: box {shard.box} occurs twice")
        seen.add((shard.name, shard.box))
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            explain("Some shards are invalid.", "; ".join(faults[:8]) + more, "fix the code that made them")
        )
