"""Starts torch's default process group, or accepts one that exists already, and finds a store for messages outside it.

Called by `Group` alone. The store carries what ranks must be able to say without a collective: which rank failed first.
"""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from disttrain.errors import LaunchError, explain
from disttrain.logs import package_logger
from disttrain.runtime.device import Device
from disttrain.runtime.environment import Launch

_log = package_logger("runtime")

_CONNECTED, _ALL_CONNECTED = "connected", "all_connected"
_stores: dict[str, Store] = {}
_prefixes = itertools.count()
"""How many groups this process has started. A launcher's store outlives a group, so each group gets its own prefix."""
_started: ProcessGroup | None = None
_prefixing_hook: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Membership:
    """How this process belongs to the default process group.

    Attributes:
        store: carries messages outside the group's collectives.
        keeps_store: whether the store ends with this process.
        adopted: whether the group existed before. Its owner closes it.
    """

    store: Store
    keeps_store: bool
    adopted: bool


def launch_of_existing_group(launch: Launch) -> Launch:
    """Take rank and world size from an existing default group where no launcher states them.

    Collective over that group; Local where there is none. Ray, `torch.multiprocessing.spawn` and notebooks may start a
    group without torchrun's variables.
    """
    if launch.launcher != "plain python" or not dist.is_initialized() or dist.group.WORLD is _started:
        return launch
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return launch
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, socket.gethostname())
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    address = launch.master_addr if len(here) == size else str(hosts[0])
    return replace(
        launch,
        launcher="process group",
        rank=rank,
        local_rank=here.index(rank),
        world_size=size,
        local_world_size=len(here),
        master_addr=address,
    )


def join_group(launch: Launch, device: Device, timeout_s: float) -> Membership:
    """Start the default process group, or accept the existing one. Collective.

    Raises LaunchError where the existing group has another size, rank or backend, belongs to an Engine that is still
    open, or where the processes do not all connect within `timeout_s` seconds.
    """
    timeout = timedelta(seconds=timeout_s)
    if dist.is_initialized():
        _check_existing(launch, device)
        _log.info("uses the existing process group with its timeout; run.timeout_s does not apply to it")
        return Membership(_store_over_group(launch, timeout), launch.rank == 0, adopted=True)
    try:
        return _start(launch, device, timeout)
    except (RuntimeError, ValueError) as error:
        address = f"{launch.master_addr}:{launch.master_port}"
        raise LaunchError(
            explain(
                f"{launch.world_size} process(es) did not all connect at {address} within {timeout_s:g} s "
                "(run.timeout_s).",
                str(error).split("\n")[0],
                "start them all, and check that every node reaches that address and port",
            )
        ) from error


def destroy_group() -> None:
    """Destroy the default group that `join_group` started. Collective."""
    global _started
    _started = None
    dist.destroy_process_group()


def _check_existing(launch: Launch, device: Device) -> None:
    if dist.group.WORLD is _started:
        raise LaunchError(
            explain(
                "Cannot start a second Engine in this process.",
                f"an earlier Engine still uses the process group ({dist.get_world_size()} rank(s))",
                "close the earlier Engine first, or create it in a `with` block",
            )
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    if (rank, size) != (launch.rank, launch.world_size):
        raise LaunchError(
            explain(
                "Cannot use the existing process group.",
                f"it has rank {rank} of {size}, and {launch.launcher} says rank {launch.rank} of {launch.world_size}",
                "initialize the group with the launcher's RANK and WORLD_SIZE, or let disttrain start it",
            )
        )
    backends = dict(item.split(":") for item in str(dist.get_backend_config()).split(","))
    needed = dict(item.split(":") for item in device.backend.split(",")) if ":" in device.backend else {"cpu": "gloo"}
    missing = [f"{kind}:{name}" for kind, name in needed.items() if backends.get(kind) != name]
    if missing:
        raise LaunchError(
            explain(
                f"Cannot use the existing process group on {device.device.type}.",
                f"its backend is {dist.get_backend_config()}, without {', '.join(missing)}",
                f"call init_process_group({device.backend!r}), or let disttrain start the group",
            )
        )


def _start(launch: Launch, device: Device, timeout: timedelta) -> Membership:
    global _started, _prefixing_hook
    place: dict[str, Any] = {"rank": launch.rank, "world_size": launch.world_size, "timeout": timeout}
    if device.device.type == "cuda":
        place["device_id"] = device.device
    store = PrefixStore(f"disttrain/{next(_prefixes)}", _rendezvous(launch, timeout))
    hook = sys.excepthook
    dist.init_process_group(device.backend, store=store, **place)
    if hook is _prefixing_hook:
        sys.excepthook = hook  # each group wraps the hook again, and tracebacks would say "[rank0]: [rank0]: ..."
    elif sys.excepthook is not hook:
        _prefixing_hook = sys.excepthook
    _started = dist.group.WORLD
    _wait_for_all(store, launch.world_size)
    # torchrun's agent keeps the store of its workers. Elsewhere the store ends with rank 0.
    keeps_store = launch.rank == 0 and launch.launcher not in ("torchrun", "accelerate launch")
    return Membership(store, keeps_store, adopted=False)


def _wait_for_all(store: Store, size: int) -> None:
    """Return when all ranks are connected.

    A rank that failed and left sooner would break a slower rank's connecting. The slower rank would then report a
    closed connection instead of the first cause.
    """
    if store.add(_CONNECTED, 1) == size:
        store.set(_ALL_CONNECTED, "")
    store.wait([_ALL_CONNECTED])


def _rendezvous(launch: Launch, timeout: timedelta) -> Store:
    """Return the store where the ranks meet: the launcher's, one on SLURM's first node, or one in this process.

    One store serves all groups of this process. Where rank 0 keeps the store, a rank that came early to a second group
    would otherwise meet the first group's store, which is about to close.
    """
    if launch.world_size == 1 and launch.master_port == 0:
        return HashStore()
    address = f"tcp://{launch.master_addr}:{launch.master_port}"
    if address not in _stores:
        url = address if launch.launcher == "srun" else "env://"
        _stores[address] = next(rendezvous(url, launch.rank, launch.world_size, timeout=timeout))[0]
    _stores[address].set_timeout(timeout)
    return _stores[address]


def _store_over_group(launch: Launch, timeout: timedelta) -> Store:
    """Return a new store for the ranks of the existing group, which has no public way to its own."""
    if launch.world_size == 1:
        return HashStore()
    server = TCPStore(launch.master_addr, 0, is_master=True, timeout=timeout) if launch.rank == 0 else None
    port = [server.port if server is not None else 0]
    dist.broadcast_object_list(port, src=0)
    return server or TCPStore(launch.master_addr, port[0], is_master=False, timeout=timeout)
