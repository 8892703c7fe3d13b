"""Computes which part of a DTensor this rank holds, and which of its copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from disttrain.torch_internals.access import check, choose, private

LocalBox = tuple[Sequence[int], Sequence[int]]


def local_box(tensor: DTensor) -> LocalBox:
    """Return the sizes of this rank's part of a DTensor, and its offsets in the full tensor. Local."""
    return _box_function(tensor.device_mesh)(tensor.shape, tensor.device_mesh, tensor.placements)


def copies_outside(mesh: DeviceMesh) -> tuple[int, int]:
    """Return (index, count): which of the parallel slices of a larger mesh `mesh` is, of how many. Local.

    A DTensor on one axis of a larger mesh is held once per slice. A mesh that is no slice returns (0, 1).
    """
    return _copies_function(mesh)(mesh)


@lru_cache(maxsize=1)
def _box_function(mesh: DeviceMesh) -> Callable[..., LocalBox]:
    """The function for all meshes, tried on this one."""

    def probed() -> Callable[..., LocalBox]:
        name = "compute_local_shape_and_global_offset"
        function: Callable[..., LocalBox] = private("torch.distributed.tensor._utils", name)
        placements = [Shard(0), *[Replicate()] * (mesh.ndim - 1)]
        size = 2 * mesh.shape[0] + 1
        found, expected = function((size,), mesh, placements), _box((size,), mesh, placements)
        check([*map(tuple, found)] == [*map(tuple, expected)], name)
        return function

    return choose("torch.distributed.tensor._utils.compute_local_shape_and_global_offset", _box, probed)


def _box(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> LocalBox:
    """Cut as `torch.chunk` does, axis by axis.

    FSDP2 cuts what tensor parallelism has cut before: a strided shard (its class is private) comes after the others.
    """
    sizes, offsets = [*shape], [0] * len(shape)
    axes: list[tuple[Any, int, int]] = [*zip(placements, mesh.shape, mesh.get_coordinate() or (), strict=True)]
    for placement, count, index in sorted(axes, key=lambda axis: hasattr(axis[0], "split_factor")):
        if not isinstance(placement, Shard) and not hasattr(placement, "split_factor"):
            continue
        dim = placement.dim
        chunk = -(-sizes[dim] // count)
        start = min(chunk * index, sizes[dim])
        sizes[dim] = min(chunk, sizes[dim] - start)
        offsets[dim] += start
    return sizes, offsets


@lru_cache(maxsize=1)
def _copies_function(mesh: DeviceMesh) -> Callable[[DeviceMesh], tuple[int, int]]:
    """The function for all meshes, tried on this one."""

    def probed() -> Callable[[DeviceMesh], tuple[int, int]]:
        root_of = private(DeviceMesh, "_get_root_mesh")
        check(isinstance(root_of(mesh), DeviceMesh), "_get_root_mesh")
        return lambda mesh: _copies_in(root_of(mesh), mesh)

    public: Callable[[DeviceMesh], tuple[int, int]] = _copies_by_ranks
    return choose("DeviceMesh._get_root_mesh", public, probed)


def _copies_in(root: DeviceMesh, mesh: DeviceMesh) -> tuple[int, int]:
    index, count = 0, 1
    # By shape and coordinate: slicing a mesh by an axis takes a millisecond, and every tensor asks.
    for axis, size, place in zip(root.mesh_dim_names or (), root.shape, root.get_coordinate() or (), strict=True):
        if axis not in (mesh.mesh_dim_names or ()):
            index, count = index * size + place, count * size
    return index, count


def _copies_by_ranks(mesh: DeviceMesh) -> tuple[int, int]:
    """As `_copies_in`, where the larger mesh is not known: it holds all ranks, in order.

    The ranks of a slice are then `first + sum(i * stride)`, one stride per axis. The index is `first` without the
    digits of those axes.
    """
    index = int(mesh.mesh.min())
    for axis in range(mesh.ndim):
        if mesh.shape[axis] > 1:
            first, second = (int(mesh.mesh.select(axis, place).min()) for place in (0, 1))
            stride = second - first
            index = index // (stride * mesh.shape[axis]) * stride + index % stride
    return index, dist.get_world_size() // prod(mesh.shape)
