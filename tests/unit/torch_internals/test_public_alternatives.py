"""The public alternatives give what torch's private functions give."""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map_only

from disttrain.torch_internals import kernels, meshes, tensors

placements = st.sampled_from([Replicate(), Partial(), Shard(0), Shard(1)])


def mesh_of(shape: tuple[int, ...], coordinate: tuple[int, ...], ranks: Any = None) -> Any:
    """The parts of a DeviceMesh that the functions read. A real one would need a process group."""
    return SimpleNamespace(shape=shape, ndim=len(shape), mesh=ranks, get_coordinate=lambda: coordinate)


@given(
    st.tuples(st.integers(0, 13), st.integers(1, 9)),
    st.lists(st.tuples(placements, st.integers(1, 4)), min_size=1, max_size=3),
)
def test_boxes_equal_torchs(shape: tuple[int, int], axes: list[tuple[Any, int]]) -> None:
    chosen, sizes = [placement for placement, _ in axes], tuple(size for _, size in axes)
    for coordinate in itertools.product(*map(range, sizes)):
        found = meshes._box(shape, mesh_of(sizes, coordinate), chosen)
        expected = _compute_local_shape_and_global_offset(shape, sizes, list(coordinate), chosen)
        assert tuple(found[0]) == tuple(expected[0])
        if all(found[0]):  # an empty box has any position
            assert tuple(found[1]) == tuple(expected[1])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_boxes_of_tensor_parallelism_under_fsdp_equal_torchs(shards: int, degree: int, rows: int) -> None:
    """FSDP2 shards rows that tensor parallelism has sharded before. A plan shards them evenly."""
    shape, sizes = (rows * degree, 3), (shards, degree)
    chosen = [_StridedShard(0, split_factor=degree), Shard(0)]
    for coordinate in itertools.product(*map(range, sizes)):
        found = meshes._box(shape, mesh_of(sizes, coordinate), chosen)
        expected = _compute_local_shape_and_global_offset(shape, sizes, list(coordinate), chosen)
        assert tuple(found[0]) == tuple(expected[0])
        if all(found[0]):
            assert tuple(found[1]) == tuple(expected[1])


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_copies_are_counted_in_the_order_of_the_other_axes(
    kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, names = (2, 3, 4), ("replicate", "shard", "tensor")
    ranks = torch.arange(24).reshape(sizes)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 24)
    for coordinate in itertools.product(*map(range, sizes)):
        inside = tuple(slice(None) if axis in kept else coordinate[axis] for axis in range(3))
        shape = tuple(sizes[axis] for axis in kept)
        mesh = mesh_of(shape, tuple(coordinate[axis] for axis in kept), ranks[inside])
        mesh.mesh_dim_names = tuple(names[axis] for axis in kept)
        root = mesh_of(sizes, coordinate, ranks)
        root.mesh_dim_names = names
        assert meshes._copies_by_ranks(mesh) == meshes._copies_in(root, mesh)


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    "tree",
    [
        {"a": [torch.ones(2), 1], "b": (torch.zeros(1), "text")},
        Pair(torch.ones(2), [None, torch.ones(1)]),
        OrderedDict(b=torch.ones(1), a=2),
        deque([torch.ones(1)], maxlen=3),
        defaultdict(list, {"a": torch.ones(1)}),
        torch.ones(3),
        object(),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_containers_are_mapped_like_torchs(tree: Any) -> None:
    found = tensors._map_containers(lambda tensor: tensor.sum().item(), tree)
    expected = tree_map_only(torch.Tensor, lambda tensor: tensor.sum().item(), tree)
    assert found == expected and type(found) is type(expected)
    assert getattr(found, "maxlen", None) == getattr(expected, "maxlen", None)
    assert getattr(found, "default_factory", None) == getattr(expected, "default_factory", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loops_give_the_bits_of_the_kernels(dtype: torch.dtype) -> None:
    values = [torch.randn(shape).to(dtype) for shape in ((3, 4), (7,), ())]
    arguments: dict[str, tuple[Any, ...]] = {
        "_foreach_copy_": ([one + 1 for one in values],),
        "_foreach_mul_": (0.37,),
        "_foreach_div_": (torch.tensor(0.37, dtype=dtype),),
    }
    for name, loop in kernels._LOOPS.items():
        ours, theirs = [one.clone() for one in values], [one.clone() for one in values]
        found = loop(ours, *arguments.get(name, ())) or ours
        expected = getattr(torch, name)(theirs, *arguments.get(name, ())) or theirs
        assert all(map(torch.equal, found, expected)), name


def test_flat_vectors_have_one_order() -> None:
    parts = [torch.randn(2, 3).t(), torch.randn(()), torch.randn(4).double()]
    flat = kernels._flatten(parts)
    assert torch.equal(flat, torch._utils._flatten_dense_tensors(parts)) and flat.dtype == torch.float64
    for ours, theirs in zip(
        kernels._unflatten(flat, parts), torch._utils._unflatten_dense_tensors(flat, parts), strict=True
    ):
        assert torch.equal(ours, theirs)
