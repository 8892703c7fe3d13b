"""Which device a rank computes on, which backend joins the ranks, and how many CPU threads each takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from disttrain.errors import LaunchError, explain
from disttrain.runtime.environment import Launch, cpu_quota, wished_threads


@dataclass(frozen=True)
class Device:
    """`backend` is torch.distributed's name: nccl beside cuda, gloo beside the CPU."""

    device: torch.device
    backend: str
    threads: int


def choose_device(asked: str, launch: Launch, threads: int | None = None) -> Device:
    """`asked` is auto, cpu or cuda. Local, touches no device memory.

    Raises LaunchError where cuda is asked for and absent, or where a node has more ranks than GPUs.
    """
    share = threads or wished_threads(launch) or max(1, cpu_quota() // launch.local_world_size)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and found == 0):
        return Device(torch.device("cpu"), "gloo", share)
    # srun --gpus-per-task=1 shows each task the one GPU that is its own.
    index = 0 if launch.launcher == "srun" and found == 1 else launch.local_rank
    if index >= found:
        raise LaunchError(
            explain(
                f"run.device={asked} gives each of {launch.local_world_size} processes on this node a GPU of its own.",
                f"{found} usable CUDA device(s)",
                f"start --nproc_per_node={found}, or set run.device=cpu"
                if found
                else "set run.device=cpu, or see why torch.cuda.is_available() is false",
            )
        )
    return Device(torch.device("cuda", index), "cpu:gloo,cuda:nccl", share)


def apply_device(device: Device) -> None:
    """Set this process's intra-op threads and current CUDA device. Local."""
    torch.set_num_threads(device.threads)
    if device.device.type == "cuda":
        torch.cuda.set_device(device.device)
