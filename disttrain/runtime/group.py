"""The process group, with a stated timeout, and the few plain collectives that rooms above need.

A world of one is a real gloo group too. Refuses to start a second group over one it did not make.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from disttrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DisttrainError,
    LaunchError,
    TrainingError,
    explain,
)
from disttrain.runtime.device import Device
from disttrain.runtime.environment import Launch
from disttrain.runtime.leaving import leave_in_time

T = TypeVar("T")

_CONNECTED, _ALL_CONNECTED = "connected", "all_connected"
_FAILURE, _KNOWN_TO = "first_failure", "failure_known_to"
_STAY_S = 5.0
"""How long a rank that failed waits for its last collectives, and rank 0, where it keeps the store, for the others to
read the first cause before it takes it along."""
_stores: dict[str, Store] = {}
_worlds = itertools.count()
"""How many groups this process has started: a launcher's store outlives a group, so each gets a prefix of its own."""


class Group:
    """The world of this run. All methods but `first_failure` and `tell_failure` are collective.

    Raises LaunchError where a group exists already, and where the processes do not all meet within `timeout_s`.
    """

    def __init__(self, launch: Launch, device: Device, *, timeout_s: float) -> None:
        if dist.is_initialized():
            raise LaunchError(
                explain(
                    "disttrain starts the process group itself.",
                    f"one that exists already ({dist.get_backend()}, {dist.get_world_size()} rank(s))",
                    "close the earlier Engine, or do not call init_process_group before",
                )
            )
        self.rank = launch.rank
        self.size = launch.world_size
        self.timeout_s = timeout_s
        self._failed = False
        # torchrun's agent keeps the store of its workers; elsewhere it lives in rank 0.
        self._keeps_store = launch.rank == 0 and launch.launcher not in ("torchrun", "accelerate launch")
        timeout = timedelta(seconds=timeout_s)
        place: dict[str, Any] = {"rank": launch.rank, "world_size": launch.world_size, "timeout": timeout}
        if device.device.type == "cuda":
            place["device_id"] = device.device
        try:
            self._store = PrefixStore(f"disttrain/{next(_worlds)}", _rendezvous(launch, timeout))
            dist.init_process_group(device.backend, store=self._store, **place)
            self._wait_for_all()
        except (RuntimeError, ValueError) as error:
            address = f"{launch.master_addr}:{launch.master_port}"
            raise LaunchError(
                explain(
                    f"{launch.world_size} process(es) are to meet at {address} within {timeout_s:g} s (run.timeout_s).",
                    str(error).split("\n")[0],
                    "start them all, and see that every node reaches that address and port",
                )
            ) from error

    def _wait_for_all(self) -> None:
        """Return when all ranks are connected.

        One that failed and left sooner would break a slower one's connecting, which then tells of a closed connection
        instead of the first cause.
        """
        if self._store.add(_CONNECTED, 1) == self.size:
            self._store.set(_ALL_CONNECTED, "")
        self._store.wait([_ALL_CONNECTED])

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's picklable value, in rank order, on rank 0; None elsewhere."""
        into: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, into)
        return into

    def gather_all(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on all ranks."""
        into: list[Any] = [None] * self.size
        dist.all_gather_object(into, value)
        return into

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def minimum(self, value: int) -> int:
        """The least of the ranks' numbers."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def add_up(self, vector: Tensor) -> Callable[[], Any]:
        """Begin to add a vector up over all ranks, in place; what comes back waits for it."""
        world = dist.group.WORLD
        assert world is not None, "the group is closed"
        return world.allreduce([vector]).wait  # dist.all_reduce takes 25 microseconds of Python more

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather_all(None)

    def beside(self) -> BesideGroup:
        """The same ranks with a way of their own to speak, for a thread: its collectives meet none of training's."""
        return BesideGroup(self)

    def agree(self, error: BaseException | None, what: str) -> None:
        """All ranks learn that one failed: raise on every rank if any rank brings an error, the first cause named."""
        told = None if error is None else (type(error).__name__, str(error), getattr(error, "exit_code", 1))
        failures = [(rank, text) for rank, text in enumerate(self.gather_all(told)) if text is not None]
        if error is not None:
            raise error
        if failures:
            rank, (kind, text, code) = failures[0]
            raise other_rank_error(f"{what} failed on rank {rank}: {kind}: {text}", code)

    def together(self, act: Callable[[], T], what: str) -> T:
        """Each rank's own `act()`; where one rank's raises, all raise, the first cause named."""
        try:
            value = act()
        except Exception as error:
            self.agree(error, what)
            raise
        self.agree(None, what)
        return value

    def tell_failure(self, text: str) -> bool:
        """Leave the first cause where the other ranks find it. Local; True if this rank was the first."""
        self._failed = True
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that kept it
            # A file's name in a message may hold bytes that are no text.
            mine = f"{self.rank}:{text}".encode(errors="backslashreplace").decode()
            first = self._store.compare_set(_FAILURE, "", mine).decode() == mine
            self._store.set(f"{_KNOWN_TO}/{self.rank}", "")
            return first
        return True

    def first_failure(self) -> tuple[int, str] | None:
        """(rank, text) of the first failure that any rank told of, if any. Local."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILURE]):
                self._failed = True
                rank, _, text = self._store.get(_FAILURE).decode().partition(":")
                self._store.set(f"{_KNOWN_TO}/{self.rank}", "")
                return int(rank), text
        return None

    def close(self) -> None:
        """Leave the group: without this, torch warns and NCCL may hang. Idempotent.

        After a failure, where the store lives in rank 0, that rank stays until all know the first cause, or 5 s.
        """
        if not dist.is_initialized():
            return
        if not self._failed:
            dist.destroy_process_group()
        else:
            # It waits for collectives under way, whose peers may never come: the first cause is to be read meanwhile.
            leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
            leaving.start()
            leaving.join(_STAY_S)
            atexit.register(leave_in_time)
        _let_threads_end()
        everyone = [f"{_KNOWN_TO}/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + _STAY_S
        while self._keeps_store and self.first_failure() and time.monotonic() < deadline:
            if self._store.check(everyone):
                return
            time.sleep(0.05)


class BesideGroup:
    """Gathers and broadcasts over a second gloo group. Made by `Group.beside`; goes with the group it was made from."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=group.timeout_s))

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's picklable value, in rank order, on rank 0; None elsewhere."""
        into: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, into, group=self._group)
        return into

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.broadcast(self.gather(None) is None)


def _let_threads_end(within_s: float = 5.0) -> None:
    """Return when gloo's threads have let go of the last collective's tensors, for which they need Python.

    Destroying the groups joins them only where nothing else (a mesh, a sharded model) holds a group. One that asks for
    Python while the interpreter ends is killed in C++, and takes the process along: "terminate called without an active
    exception" (torch 2.13; 5 of 25 runs that held a group). A thread is done when it sleeps, and slept all the while
    that this one left Python to it.
    """
    deadline, before = time.monotonic() + within_s, None
    while time.monotonic() < deadline:
        now = _gloo_threads()
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now
        time.sleep(0.001)


def _gloo_threads() -> dict[str, tuple[str, str]]:
    """State and number of waits of each thread that runs collectives, by id; none where there is no /proc."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (task / "comm").read_text().startswith("pt_gloo"):
                lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
                told = {key: value.strip() for key, _, value in lines}
                found[task.name] = told["State"][:1], told["voluntary_ctxt_switches"]
    return found


def _rendezvous(launch: Launch, timeout: timedelta) -> Store:
    """Where the ranks meet: the launcher's store, SLURM's first node, or this process alone.

    One for all of this process's worlds: where rank 0 keeps it, a rank that came early to a second one would meet the
    first, about to close.
    """
    if launch.world_size == 1 and launch.master_port == 0:
        return HashStore()
    address = f"tcp://{launch.master_addr}:{launch.master_port}"
    if address not in _stores:
        way = address if launch.launcher == "srun" else "env://"
        _stores[address] = next(rendezvous(way, launch.rank, launch.world_size, timeout=timeout))[0]
    _stores[address].set_timeout(timeout)
    return _stores[address]


class OtherRankError(DisttrainError):
    """Another rank failed first; `exit_code` is that rank's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_ALSO = {
    kind.exit_code: type(OtherRankError.__name__, (OtherRankError, kind), {"__doc__": OtherRankError.__doc__})
    for kind in (ConfigError, LaunchError, DataError, CheckpointError, TrainingError)
}


def other_rank_error(message: str, exit_code: int) -> OtherRankError:
    """One that is also of the class which the other rank raised: a script that catches it there catches it here."""
    made: OtherRankError = _ALSO.get(exit_code, OtherRankError)(message, exit_code)
    return made
