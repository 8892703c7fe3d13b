"""Whose fault it was: one rank's error becomes every rank's end, and the first cause is what the user reads."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch.distributed as dist

from disttrain.data import is_lost_worker, lost_worker
from disttrain.errors import DisttrainError, LaunchError, explain
from disttrain.runtime import Group, OtherRankError

_WAIT_S = 2.0
"""How long a rank whose peer went away waits to learn why: the peer tells before it leaves."""


@dataclass(frozen=True)
class Failure:
    """`mine` says that this rank was the first; `text` is the first cause; `exit_code` is every rank's.

    `replaced` says that `text` tells more than the error that was raised (a peer that went away without a word).
    """

    mine: bool
    rank: int
    exit_code: int
    text: str
    replaced: bool = False


def settle(group: Group, error: BaseException) -> Failure:
    """Agree, through the store and without a collective, on whose failure came first. Local."""
    if isinstance(error, OtherRankError):
        return _others(group, error.exit_code) or Failure(False, -1, error.exit_code, str(error))
    replaced = group.size > 1 and _peer_went_away(error)
    if replaced:
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            found = _others(group, 1)
            if found is not None:
                return found
            time.sleep(0.05)
        error = LaunchError(
            explain(
                "All processes of this world are to train together.",
                f"one of them ended without a word (killed, out of memory, a lost node): {str(error)[:200]}",
                "run the same command again: it continues from the last checkpoint",
            )
        )
    if is_lost_worker(error):
        replaced, error = True, lost_worker(error)
    code = error.exit_code if isinstance(error, DisttrainError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    text = f"{type(error).__name__}: {error}"
    if group.report_failure(f"{code}:{text}"):
        return Failure(True, group.rank, code, text, replaced)
    return _others(group, code) or Failure(True, group.rank, code, text, replaced)


def _others(group: Group, code: int) -> Failure | None:
    found = group.first_failure()
    if found is None or found[0] == group.rank:
        return None
    rank, told = found
    number, _, text = told.partition(":")
    return Failure(False, rank, int(number) if number.isdigit() else code, text)


def _peer_went_away(error: BaseException) -> bool:
    """Whether a collective failed because of its peer: by type for NCCL and the store, by gloo's own words else."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)  # gloo names its source file
