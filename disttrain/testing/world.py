"""Runs a function on several real ranks, placed as torchrun would place them, and returns their results.

Processes are forked from a server that has already imported torch, so that a world of four costs one second, not ten.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["disttrain.testing.preloaded"])


class WorldError(AssertionError):
    """A rank failed or hung. The message contains the traceback of every rank."""


def free_port() -> int:
    """Returns a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_world(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Calls `function(*args)` on `size` ranks and returns their results in rank order. Raises WorldError."""
    # The store lives here, as in torchrun's agent. On rank 0 it would end with the first Engine.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = _CONTEXT.Queue()
    workers = [
        _CONTEXT.Process(target=_rank, args=(rank, size, store.port, results, function, args), daemon=False)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(found) < size and time.monotonic() < deadline:
            try:
                rank, good, value = results.get(timeout=0.5)
            except Exception:  # noqa: BLE001 - queue.Empty, or a rank that died while it wrote
                if all(not worker.is_alive() for worker in workers) and results.empty():
                    break
                continue
            found[rank] = (good, value)
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
    failures = [f"--- rank {rank}\n{value}" for rank, (good, value) in sorted(found.items()) if not good]
    silent = [str(rank) for rank in range(size) if rank not in found]
    if silent:
        failures.append(f"--- no result from rank(s) {', '.join(silent)} within {timeout_s} s")
    if failures:
        raise WorldError("\n".join(failures))
    return [found[rank][1] for rank in range(size)]


def take_place(rank: int, size: int, port: int) -> None:
    """Sets the environment of this process as torchrun does for a rank whose store is at `port`. Local."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )


def _rank(rank: int, size: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    take_place(rank, size, port)
    try:
        results.put((rank, True, function(*args)))
    except BaseException:  # noqa: BLE001 - the test must see any error
        results.put((rank, False, traceback.format_exc()))
        sys.stderr.flush()
    results.close()
    results.join_thread()
