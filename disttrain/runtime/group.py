"""Provides the process group of a run and the few plain collectives that the packages above need.

A world of one is a real gloo group too. An existing default group of the right size and backend is used and left open.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.errors import CheckpointError, ConfigError, DataError, DisttrainError, LaunchError, TrainingError
from disttrain.runtime.device import Device
from disttrain.runtime.environment import Launch
from disttrain.runtime.leaving import leave_in_time
from disttrain.runtime.process_group import destroy_group, join_group

T = TypeVar("T")

_FAILURE, _KNOWN_TO = "first_failure", "failure_known_to"
_STAY_S = 5.0
"""How long a failed rank waits for its last collectives. Rank 0, where it keeps the store, waits as long for the others
to read the first cause."""


class Group:
    """All ranks of this run. Collective, except `first_failure` and `report_failure`.

    Raises LaunchError where the processes do not all connect within `timeout_s` seconds, and where an existing default
    process group has another size, rank or backend.
    """

    def __init__(self, launch: Launch, device: Device, *, timeout_s: float) -> None:
        self.rank = launch.rank
        self.size = launch.world_size
        self.timeout_s = timeout_s
        self._failed = False
        self._closed = False
        self._background: list[BackgroundGroup] = []
        self._membership = join_group(launch, device, timeout_s)
        self._store = self._membership.store

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's picklable value, in rank order, on rank 0; None on the other ranks."""
        into: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, into)
        return into

    def gather_all(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order, on all ranks."""
        into: list[Any] = [None] * self.size
        dist.all_gather_object(into, value)
        return into

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable value on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def minimum(self, value: int) -> int:
        """Return the smallest of the ranks' numbers."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def add_up(self, vector: Tensor) -> Callable[[], Any]:
        """Start to sum a vector over all ranks, in place. Call the returned function to wait for the sum."""
        world = dist.group.WORLD
        assert world is not None, "the group is closed"
        return world.allreduce([vector]).wait  # dist.all_reduce takes 25 microseconds of Python more

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather_all(None)

    def background(self) -> BackgroundGroup:
        """Connect the same ranks a second time, for a thread. Its collectives never mix with those of training."""
        made = BackgroundGroup(self)
        self._background.append(made)
        return made

    def agree(self, error: BaseException | None, what: str) -> None:
        """Raise on every rank if any rank passes an error. The message of the others names the first cause."""
        mine = None if error is None else (type(error).__name__, str(error), getattr(error, "exit_code", 1))
        failures = [(rank, failure) for rank, failure in enumerate(self.gather_all(mine)) if failure is not None]
        if error is not None:
            raise error
        if failures:
            rank, (kind, text, code) = failures[0]
            raise other_rank_error(f"{what} failed on rank {rank}: {kind}: {text}", code)

    def together(self, act: Callable[[], T], what: str) -> T:
        """Call `act()` on each rank. Where it raises on one rank, all ranks raise and name the first cause."""
        try:
            value = act()
        except Exception as error:
            self.agree(error, what)
            raise
        self.agree(None, what)
        return value

    def report_failure(self, text: str) -> bool:
        """Store the first cause where the other ranks find it. Local. Returns True if this rank was the first."""
        self._failed = True
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that kept it
            # A file's name in a message may hold bytes that are not text.
            mine = f"{self.rank}:{text}".encode(errors="backslashreplace").decode()
            first = self._store.compare_set(_FAILURE, "", mine).decode() == mine
            self._store.set(f"{_KNOWN_TO}/{self.rank}", "")
            return first
        return True

    def first_failure(self) -> tuple[int, str] | None:
        """Return (rank, text) of the first failure that any rank reported, None if there was none. Local."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILURE]):
                self._failed = True
                rank, _, text = self._store.get(_FAILURE).decode().partition(":")
                self._store.set(f"{_KNOWN_TO}/{self.rank}", "")
                return int(rank), text
        return None

    def close(self) -> None:
        """Destroy the group, unless it existed before this run. Idempotent.

        Without this, torch warns and NCCL may hang. After a failure, where the store ends with rank 0, that rank waits
        until all ranks have read the first cause, for 5 s at most.
        """
        if self._closed or not dist.is_initialized():
            return
        self._closed = True
        if self._membership.adopted:
            if not self._failed:
                for group in self._background:
                    group.close()
        else:
            self._destroy()
        everyone = [f"{_KNOWN_TO}/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + _STAY_S
        while self._membership.keeps_store and self.first_failure() and time.monotonic() < deadline:
            if self._store.check(everyone):
                return
            time.sleep(0.05)

    def _destroy(self) -> None:
        if not self._failed:
            destroy_group()
        else:
            # It waits for collectives under way, whose peers may never come. Others read the first cause meanwhile.
            leaving = threading.Thread(target=destroy_group, daemon=True)
            leaving.start()
            leaving.join(_STAY_S)
            atexit.register(leave_in_time)
        _let_threads_end()


class BackgroundGroup:
    """Gathers and broadcasts over a second gloo group. Made by `Group.background`, and closed with that group."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=group.timeout_s))

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's picklable value, in rank order, on rank 0; None on the other ranks."""
        into: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, into, group=self._group)
        return into

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable value on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.broadcast(self.gather(None) is None)

    def close(self) -> None:
        """Destroy the second group."""
        dist.destroy_process_group(self._group)


def _let_threads_end(within_s: float = 5.0) -> None:
    """Return when gloo's threads have released the last collective's tensors, for which they need Python.

    Destroying the groups joins these threads only where nothing else (a mesh, a sharded model) holds a group. A thread
    that asks for Python while the interpreter ends is killed in C++ and takes the process along: "terminate called
    without an active exception" (torch 2.13; 5 of 25 runs that held a group). A thread is done when it sleeps and did
    not wake while this thread released Python to it.
    """
    deadline, before = time.monotonic() + within_s, None
    while time.monotonic() < deadline:
        now = _gloo_threads()
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now
        time.sleep(0.001)


def _gloo_threads() -> dict[str, tuple[str, str]]:
    """Return state and number of waits of each thread that runs collectives, by id. Empty where /proc is missing."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            if (task / "comm").read_text().startswith("pt_gloo"):
                lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
                status = {key: value.strip() for key, _, value in lines}
                found[task.name] = status["State"][:1], status["voluntary_ctxt_switches"]
    return found


class OtherRankError(DisttrainError):
    """Another rank failed first. `exit_code` is the other rank's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_ALSO = {
    kind.exit_code: type(OtherRankError.__name__, (OtherRankError, kind), {"__doc__": OtherRankError.__doc__})
    for kind in (ConfigError, LaunchError, DataError, CheckpointError, TrainingError)
}


def other_rank_error(message: str, exit_code: int) -> OtherRankError:
    """Build an error that is also of the other rank's class. Code that catches the class there catches it here."""
    made: OtherRankError = _ALSO.get(exit_code, OtherRankError)(message, exit_code)
    return made
