"""A checksum of a tensor is the same for every sharding of it, and different for every other tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disttrain.checkpoint import Box, Shard, combine_fingerprints, fingerprint, full_shard

WORD = 2**64


def expected(tensor: Tensor) -> int:
    """The checksum computed element by element with Python integers."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    total = 0
    for place, bits in enumerate(flat.contiguous().view(size[flat.dtype.itemsize]).flatten().tolist()):
        mixed = place * 0xFF51AFD7ED558CCD % WORD
        total += ((mixed ^ mixed >> 33) | 1) * (2 * bits + 1)
    return total % WORD


def cut(tensor: Tensor, edges: list[list[int]]) -> list[Shard]:
    spans = [list(itertools.pairwise(sorted({0, size, *own}))) for size, own in zip(tensor.shape, edges, strict=True)]
    found = []
    for box in itertools.product(*spans):
        place = Box(tuple(a for a, _ in box), tuple(b - a for a, b in box))
        found.append(Shard("model/m/w", tuple(tensor.shape), place, tensor[place.slices()]))
    return found


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_is_the_same_for_every_sharding(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
    )
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    edges = [data.draw(st.lists(st.integers(1, size), max_size=2)) for size in shape]
    edges = [[edge for edge in own if edge < size] for own, size in zip(edges, shape, strict=True)]
    assert combine_fingerprints(map(fingerprint, cut(tensor, edges))) == expected(tensor)


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.zeros(0, 3), torch.tensor([True, False]), torch.arange(9)])
def test_of_small_and_odd_tensors(tensor: Tensor) -> None:
    assert fingerprint(full_shard("model/m/w", tensor)) == expected(tensor)


def test_of_more_than_a_piece() -> None:
    tensor = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    assert fingerprint(full_shard("model/m/w", tensor)) == combine_fingerprints(
        map(fingerprint, cut(tensor, [[1], [70_000]]))
    )


def test_any_changed_bit_and_any_two_swapped_elements_change_it() -> None:
    tensor = torch.randn(40, generator=torch.Generator().manual_seed(0))
    before = fingerprint(full_shard("model/m/w", tensor))
    for place, bit in itertools.product(range(40), range(32)):
        other = tensor.clone()
        other.view(torch.int32)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert fingerprint(full_shard("model/m/w", other)) != before
    for one, two in itertools.combinations(range(40), 2):
        other = tensor.clone()
        other[[one, two]] = tensor[[two, one]]
        assert fingerprint(full_shard("model/m/w", other)) != before
