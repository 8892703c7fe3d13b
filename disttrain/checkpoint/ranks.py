"""Lets all ranks learn the result of a collective operation, including the failure of a single rank.

The interface `Ranks` states what the checkpoint package needs from a process group. `SoleRank` implements it for a
process without a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from disttrain.errors import CheckpointError

Local = TypeVar("Local")
Agreed = TypeVar("Agreed")


class Ranks(Protocol):
    """The collectives that checkpoints need. Every method is collective. Values must be small and picklable."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any, /) -> list[Any] | None:
        """Return every rank's value, in rank order, on rank 0. Return None on the other ranks."""
        ...

    def broadcast(self, value: Any, /) -> Any:
        """Return rank 0's value on all ranks."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...


@dataclass(frozen=True)
class SoleRank:
    """A world of one rank, for a process without a process group."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any, /) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any, /) -> Any:
        return value

    def barrier(self) -> None:
        return


def run_collectively(
    ranks: Ranks, act: Callable[[], Local], judge: Callable[[list[Local]], Agreed], *, failed: str
) -> Agreed:
    """Run `act` on every rank and `judge` on rank 0, and return the result of `judge` on every rank. Collective.

    `judge` receives the results of all ranks in rank order. If `act` fails on any rank, or `judge` fails, every rank
    raises CheckpointError with `failed` and the first cause. One gather and one broadcast take place in every case, so
    no rank is left waiting.
    """
    value, cause = _attempt(act)
    gathered = ranks.gather((value, _describe(cause)))
    verdict: tuple[Any, str | None] = (None, None)
    if gathered is not None:
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(gathered) if text is not None]
        if failures:
            verdict = (None, failures[0])
        else:
            agreed, cause = _attempt(lambda: judge([local for local, _ in gathered]))
            verdict = (agreed, _describe(cause))
    result, failure = ranks.broadcast(verdict)
    try:
        if failure is not None:
            raise CheckpointError(f"{failed}\n  {failure}") from cause
    finally:
        # The traceback of `cause` holds this frame. Without this line, the objects that `act` used would stay in memory
        # until garbage collection.
        del cause
    return result  # type: ignore[no-any-return]


def _attempt(act: Callable[[], Local]) -> tuple[Local | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome; the caller raises the error
        return None, error


def _describe(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
