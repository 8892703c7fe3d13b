"""Implements `disttrain train`: trains in one process, or prints the torchrun command for several processes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import prod

from disttrain.config import Config, load_to_train
from disttrain.errors import ConfigError, explain
from disttrain.run import run_and_exit
from disttrain.runtime.environment import read_launch


def train_config(source: str, overrides: Sequence[str], *, processes: int | None = None) -> None:
    """Train in this process and end it with the exit code of `disttrain.run`.

    With `processes` above 1, print the torchrun command and return. Raises ConfigError where the config's mesh needs
    several processes and this process is alone.
    """
    if processes is not None and processes > 1:
        load_to_train(source, overrides)
        print(torchrun_command(source, overrides, processes))
        return
    if read_launch().world_size == 1:
        needed = processes_of_mesh(load_to_train(source, overrides))
        if needed > 1:
            raise ConfigError(
                explain(
                    f"Cannot train {source} in one process.",
                    f"its mesh needs {needed} processes",
                    f"start them with: {torchrun_command(source, overrides, needed)}",
                )
            )
    run_and_exit([source, *overrides])


def processes_of_mesh(config: Config) -> int:
    """Return the smallest number of processes that fits the config's mesh. Pure."""
    mesh = config.mesh
    return prod(size for size in (mesh.replicate, mesh.shard, mesh.tensor) if size > 0)


def torchrun_command(source: str, overrides: Sequence[str], processes: int) -> str:
    """Return the command that trains a config in several processes on one machine. Pure."""
    return shlex.join(
        ["torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", "disttrain.run", source, *overrides]
    )
