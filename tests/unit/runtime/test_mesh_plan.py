"""The product of the mesh degrees is the world size, and a rank's part of the data follows from the mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from world import run_world

from disttrain.errors import ConfigError
from disttrain.runtime import Group, MeshSizes, build_mesh, choose_device, plan_mesh, read_launch

DEGREES = st.integers(1, 12)


@given(DEGREES, DEGREES, DEGREES, st.sampled_from(["replicate", "shard", "tensor", None]))
def test_the_missing_degree_is_computed(replicate: int, shard: int, tensor: int, free: str | None) -> None:
    degrees = {"replicate": replicate, "shard": shard, "tensor": tensor}
    asked = {name: -1 if name == free else degree for name, degree in degrees.items()}
    found = plan_mesh(replicate * shard * tensor, **asked)
    assert found == MeshSizes(**degrees)
    assert found.data_parallel == replicate * shard


@given(st.integers(1, 64), *[st.integers(-3, 12)] * 3)
def test_degrees_that_do_not_multiply_to_the_world_are_rejected(
    world: int, replicate: int, shard: int, tensor: int
) -> None:
    degrees = (replicate, shard, tensor)
    fits = any(
        all(asked in (-1, degree) for asked, degree in zip(degrees, whole, strict=True)) and degrees.count(-1) <= 1
        for whole in [(r, s, world // r // s) for r in divisors(world) for s in divisors(world // r)]
    )
    if fits:
        found = plan_mesh(world, replicate=replicate, shard=shard, tensor=tensor)
        assert found.replicate * found.shard * found.tensor == world
    else:
        with pytest.raises(ConfigError, match=rf"mesh.replicate=.*(?s:.*){world} process"):
            plan_mesh(world, replicate=replicate, shard=shard, tensor=tensor)


def divisors(number: int) -> list[int]:
    return [degree for degree in range(1, number + 1) if number % degree == 0]


def test_by_default_all_processes_shard() -> None:
    assert plan_mesh(8) == MeshSizes(replicate=1, shard=8, tensor=1)
    assert plan_mesh(1) == MeshSizes(replicate=1, shard=1, tensor=1)


def place(*meshes: tuple[int, int, int]) -> list[Any]:
    """(part, ranks of the shard axis, ranks of the tensor axis) of this rank in each mesh."""
    launch = read_launch()
    group = Group(launch, choose_device("cpu", launch), timeout_s=60)
    found = []
    for replicate, shard, tensor in meshes:
        mesh = build_mesh(MeshSizes(replicate, shard, tensor), "cpu", launch.rank)
        axes = [torch.distributed.get_process_group_ranks(mesh.device_mesh.get_group(a)) for a in ("shard", "tensor")]
        found.append((mesh.part, *axes))
    group.close()
    return found


def test_ranks_that_share_a_coordinate_have_the_same_part_of_the_data() -> None:
    plain, tensor, hybrid = zip(*run_world(4, place, (1, 4, 1), (1, 2, 2), (2, 2, 1)), strict=True)
    assert list(plain) == [((rank, 4), [0, 1, 2, 3], [rank]) for rank in range(4)]
    assert list(tensor) == [
        ((0, 2), [0, 2], [0, 1]),
        ((0, 2), [1, 3], [0, 1]),
        ((1, 2), [0, 2], [2, 3]),
        ((1, 2), [1, 3], [2, 3]),
    ]
    assert [(part, shard) for part, shard, _ in hybrid] == [
        ((0, 4), [0, 1]),
        ((1, 4), [0, 1]),
        ((2, 4), [2, 3]),
        ((3, 4), [2, 3]),
    ]
