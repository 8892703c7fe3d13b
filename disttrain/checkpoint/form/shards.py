"""What callers bring to this room: the shards a rank holds, and a way to speak with the other ranks.

Owns the names of tensors (`KIND/OWNER/NAME`), and `take_step`: how all ranks learn that one of them failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, whole
from disttrain.errors import CheckpointError, explain

KINDS = ("model", "optim", "objective", "ema", "user")

Local = TypeVar("Local")
Agreed = TypeVar("Agreed")


@dataclass(frozen=True)
class Shard:
    """One box of one tensor as this rank holds it.

    `tensor` has exactly `box.sizes` and is written into on load. `replica` is (this holder's index, number of
    holders of the same box). A rank names every tensor of the checkpoint it takes part in, with an empty box where it
    holds nothing of it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    replica: tuple[int, int] = (0, 1)


def whole_shard(name: str, tensor: Tensor, replica: tuple[int, int] = (0, 1)) -> Shard:
    """A tensor that this rank holds whole."""
    return Shard(name, tuple(tensor.shape), whole(tensor.shape), tensor, replica)


def name_fault(name: str) -> str | None:
    """What is wrong with a tensor's name, in words; None for a good one."""
    kind, owner, rest = [*name.split("/", 2), "", ""][:3]
    if kind not in KINDS:
        return f"{name!r} does not begin with one of {', '.join(kind + '/' for kind in KINDS)}"
    return None if owner and rest else f"{name!r} is not of the form KIND/OWNER/NAME"


def shard_fault(shard: Shard) -> str | None:
    """What is wrong with a shard in itself, in words; None for a good one."""
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
        return f"{shard.name}: a tensor on the meta device, which holds no numbers"
    return None


class Ranks(Protocol):
    """The world, as far as this room needs it. All methods are collective; values are small and picklable."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any, /) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        ...

    def broadcast(self, value: Any, /) -> Any:
        """Rank 0's value, on all ranks."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...


@dataclass(frozen=True)
class SoleRank:
    """A world of one, for a process without a process group."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any, /) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any, /) -> Any:
        return value

    def barrier(self) -> None:
        return


def take_step(ranks: Ranks, act: Callable[[], Local], judge: Callable[[list[Local]], Agreed], *, asked: str) -> Agreed:
    """Each rank acts, rank 0 judges what all brought, every rank gets the verdict. Collective.

    Raises CheckpointError with the first cause on every rank if any rank's act, or the judgement, fails: one gather
    and one broadcast happen whatever fails, so no rank is left waiting.
    """
    value, cause = _attempt(act)
    gathered = ranks.gather((value, _told(cause)))
    verdict: tuple[Any, str | None] = (None, None)
    if gathered is not None:
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(gathered) if text is not None]
        if failures:
            verdict = (None, failures[0])
        else:
            agreed, cause = _attempt(lambda: judge([brought for brought, _ in gathered]))
            verdict = (agreed, _told(cause))
    result, failure = ranks.broadcast(verdict)
    try:
        if failure is not None:
            raise CheckpointError(f"{asked}\n  {failure}") from cause
    finally:
        del cause  # its traceback holds this frame: what `act` had in hand would live until garbage is collected
    return result  # type: ignore[no-any-return]


def _attempt(act: Callable[[], Local]) -> tuple[Local | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for word of it; raised by the caller
        return None, error


def _told(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def refuse_bad_shards(shards: Sequence[Shard]) -> None:
    """Raise CheckpointError with every fault that shards have in themselves, twice-named boxes included. Local."""
    faults = [fault for fault in map(shard_fault, shards) if fault]
    seen: set[tuple[str, Box]] = set()
    for shard in shards:
        if shard.box.numel and (shard.name, shard.box) in seen:
            faults.append(f"{shard.name}: box {shard.box} is given twice")
        seen.add((shard.name, shard.box))
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            explain("some shards are not valid.", "; ".join(faults[:8]) + more, "mend what made them")
        )
