"""The mesh of ranks and a rank's data-parallel coordinate on it.

Data, batch arithmetic, seeds and metrics are cut by `Mesh.part`, never by rank or world size: ranks that share a
coordinate (tensor parallel) see the same data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disttrain.errors import ConfigError, explain


@dataclass(frozen=True)
class MeshSizes:
    """Degrees whose product is the world size."""

    replicate: int
    shard: int
    tensor: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard * self.tensor

    @property
    def data_parallel(self) -> int:
        """Number of different parts of the data."""
        return self.replicate * self.shard


def plan_mesh(world_size: int, *, replicate: int = 1, shard: int = -1, tensor: int = 1) -> MeshSizes:
    """Fill the one degree that is -1. Raises ConfigError where the degrees do not multiply to `world_size`."""
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
                f"{asked} is to multiply to the world size.",
                f"{world_size} process(es)",
                "set one degree to -1, or start as many processes as the degrees multiply to",
            )
        )
    return MeshSizes(**degrees)


@dataclass(frozen=True)
class Mesh:
    """`part` is (index, count): which part of the data this rank computes, of how many; `data_group` joins one rank of
    each part. Of the ranks that share a part, one `counts`: its numbers are the part's."""

    sizes: MeshSizes
    device_mesh: DeviceMesh
    part: tuple[int, int]
    data_group: ProcessGroup
    counts: bool = True


def build_mesh(sizes: MeshSizes, device_type: str, rank: int) -> Mesh:
    """Collective: all ranks call it after the process group exists."""
    shape = (sizes.replicate, sizes.shard, sizes.tensor)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
    data_group = (
        dist.group.WORLD if sizes.tensor == 1 else device_mesh["replicate", "shard"]._flatten("data").get_group()
    )
    assert data_group is not None
    part = (rank // sizes.tensor, sizes.data_parallel)
    return Mesh(sizes, device_mesh, part, data_group, counts=rank % sizes.tensor == 0)
