"""Plans and builds the mesh of ranks, and derives each rank's part of the data from it.

Data, batch arithmetic, seeds and metrics follow `Mesh.part`, never rank or world size: ranks that share a part (tensor
parallel) see the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disttrain.errors import ConfigError, explain


@dataclass(frozen=True)
class MeshSizes:
    """The size of each mesh axis. Their product is the world size."""

    replicate: int
    shard: int
    tensor: int

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.replicate * self.shard * self.tensor

    @property
    def data_parallel(self) -> int:
        """The number of different parts of the data."""
        return self.replicate * self.shard


def plan_mesh(world_size: int, *, replicate: int = 1, shard: int = -1, tensor: int = 1) -> MeshSizes:
    """Replace the size that is -1. Local. Raises ConfigError where the product of the sizes is not `world_size`."""
    degrees = {"replicate": replicate, "shard": shard, "tensor": tensor}
    free = [name for name, degree in degrees.items() if degree == -1]
    known = 1
    for degree in degrees.values():
        known *= degree if degree != -1 else 1
    if len(free) == 1 and known >= 1 and world_size % known == 0:
        degrees[free[0]] = world_size // known
        known = world_size
    if known != world_size or len(free) > 1 or min(degrees.values()) < 1:
        asked = ", ".join(f"mesh.{name}={degree}" for name, degree in degrees.items())
        raise ConfigError(
            explain(
                f"{asked} does not multiply to the world size.",
                f"{world_size} process(es)",
                "set one size to -1, or start as many processes as the sizes multiply to",
            )
        )
    return MeshSizes(**degrees)


@dataclass(frozen=True)
class Mesh:
    """The mesh of this run, as one rank sees it.

    Attributes:
        sizes: the size of each axis.
        device_mesh: torch's mesh, with the axes replicate, shard and tensor.
        part: (index, count): which part of the data this rank computes, and the number of parts.
        data_group: the group of one rank from each part.
        counts: whether this rank's numbers represent its part. True for one of the ranks that share a part.
    """

    sizes: MeshSizes
    device_mesh: DeviceMesh
    part: tuple[int, int]
    data_group: ProcessGroup
    counts: bool = True


def build_mesh(sizes: MeshSizes, device_type: str, rank: int) -> Mesh:
    """Build torch's mesh over all ranks. Collective; the process group must exist."""
    shape = (sizes.replicate, sizes.shard, sizes.tensor)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
    data_group = dist.group.WORLD if sizes.tensor == 1 else group_across(device_mesh, ("replicate", "shard"))
    assert data_group is not None
    part = (rank // sizes.tensor, sizes.data_parallel)
    return Mesh(sizes, device_mesh, part, data_group, counts=rank % sizes.tensor == 0)


def group_across(device_mesh: DeviceMesh, axes: Sequence[str]) -> ProcessGroup:
    """Return the group of the ranks that share this rank's place on all other axes of a mesh over all ranks.

    Collective: all ranks call it with the same axes.
    """
    names = device_mesh.mesh_dim_names
    assert names is not None, "build_mesh names the axes"
    inside = [names.index(axis) for axis in axes]
    outside = [place for place in range(device_mesh.ndim) if place not in inside]
    size = prod(device_mesh.shape[place] for place in inside)
    ranks = device_mesh.mesh.permute(*outside, *inside).reshape(-1, size).tolist()
    group, _ = dist.new_subgroups_by_enumeration(ranks)  # type: ignore[no-untyped-call]
    assert isinstance(group, ProcessGroup), "every rank is in one group"
    return group
