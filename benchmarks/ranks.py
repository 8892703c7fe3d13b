"""Runs a function on new gloo processes and returns the result of each rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def run_ranks(size: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """Calls `function(*given)` on `size` new processes, placed as torchrun would. Returns results in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, size, port, results, function, given)) for rank in range(size)]
    for process in ranks:
        process.start()
    found = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    failed = [rank for rank, (good, _) in found.items() if not good]
    if failed:
        raise RuntimeError(f"rank {failed[0]} failed: {found[failed[0]][1]}")
    return [found[rank][1] for rank in range(size)]


def _rank(rank: int, size: int, port: int, results: Any, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"OMP_NUM_THREADS": "1"})
    if size > 1:  # a single process is started by plain `python`
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    try:
        found: tuple[bool, Any] = (True, function(*given))
    except BaseException as error:  # noqa: BLE001 - the parent reports any error
        found = (False, repr(error))
    results.put((rank, found))
    os._exit(0)  # a process group that a loop left open may keep the interpreter from exiting
