"""Chooses a rank's device, the backend that connects the ranks, and the number of CPU threads of each rank."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from disttrain.errors import LaunchError, explain
from disttrain.runtime.environment import Launch, cpu_quota, wished_threads
from disttrain.torch_internals.compiling import has_cpp_compiler


@dataclass(frozen=True)
class Device:
    """A rank's device.

    Attributes:
        device: the torch device.
        backend: torch.distributed's backend: gloo on the CPU; nccl on CUDA, with gloo for CPU tensors.
        threads: CPU threads of one rank.
    """

    device: torch.device
    backend: str
    threads: int


def choose_device(asked: str, launch: Launch, threads: int | None = None) -> Device:
    """Choose the device for `asked`: auto, cpu or cuda. Local; touches no device memory.

    Raises LaunchError where `asked` is cuda and no GPU is usable, or where a node has more ranks than GPUs.
    """
    share = threads or wished_threads(launch) or max(1, cpu_quota() // launch.local_world_size)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and found == 0):
        return Device(torch.device("cpu"), "gloo", share)
    # srun --gpus-per-task=1 shows each task only its own GPU.
    index = 0 if launch.launcher == "srun" and found == 1 else launch.local_rank
    if index >= found:
        raise LaunchError(
            explain(
                f"run.device={asked} needs a GPU for each of the {launch.local_world_size} processes on this node.",
                f"{found} usable CUDA device(s)",
                f"start --nproc_per_node={found}, or set run.device=cpu"
                if found
                else "set run.device=cpu, or see why torch.cuda.is_available() is false",
            )
        )
    return Device(torch.device("cuda", index), "cpu:gloo,cuda:nccl", share)


def check_device(device: Device, *, compute: str, compiles: bool) -> None:
    """Raise LaunchError for a precision that the device lacks, or where no compiler is installed. Local.

    `compute` is the config's precision.compute. `compiles` is memory.compile.
    """
    kind = device.device.type
    if compute == "fp16" and kind == "cpu":
        raise LaunchError(
            explain(
                "precision.compute=fp16 needs a device that computes in fp16.",
                "run.device is cpu",
                "use precision.compute=bf16, which CPUs support, or run on a GPU",
            )
        )
    missing = _missing_compiler(kind) if compiles else None
    if missing is not None:
        raise LaunchError(
            explain(
                "memory.compile=true cannot compile the model's blocks with torch.compile.",
                missing,
                "install it on every node, or set memory.compile=false",
            )
        )


def _missing_compiler(kind: str) -> str | None:
    """Return what torch.compile lacks for a kind of device, None where nothing is missing."""
    if kind == "cuda":
        return None if find_spec("triton") is not None else "the package triton, which writes GPU kernels, is missing"
    return None if has_cpp_compiler() else "no C++ compiler (g++, or what CXX names) on this node"


def apply_device(device: Device) -> None:
    """Set this process's intra-op threads and current CUDA device. Local."""
    torch.set_num_threads(device.threads)
    if device.device.type == "cuda":
        torch.cuda.set_device(device.device)
