"""Computes a tensor's checksum independently of how the tensor is cut into boxes. Pure.

Every rank sums over its boxes, and the sums are added. Element i in the row-major order of the full tensor, with the
bits b, contributes `odd(mix(i)) * (2 b + 1)` modulo 2^64. `mix` is a round of MurmurHash3's finalizer (public domain).
A single changed element always changes the sum, because an odd number times a nonzero difference is not zero. The
checksum detects mistakes, not malice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box
from disttrain.checkpoint.form.shards import Shard

_PIECE = 2**16
"""Elements processed at once. Temporaries of half a MiB stay in a core's cache."""
_WORD = 2**64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = -0xAE502812AA7333  # 0xFF51AFD7ED558CCD as a signed word


def combine_fingerprints(parts: Iterable[int]) -> int:
    """Return the fingerprint of a tensor from the fingerprints of its boxes."""
    return sum(parts) % _WORD


def fingerprint(shard: Shard) -> int:
    """Return the contribution of one box to its tensor's fingerprint, a 64-bit number.

    Local. Temporaries take a few MiB.
    """
    return combine_fingerprints(_piece(shard.tensor, shard.box, shard.shape, piece) for piece in _pieces(shard.box))


def _pieces(box: Box) -> Iterator[Box]:
    """Yield boxes of a local tensor with about `_PIECE` elements, or one row each if a row is larger."""
    if not box.sizes or not box.numel:
        yield Box((0,) * len(box.sizes), box.sizes)
        return
    rows = max(1, _PIECE // (box.numel // box.sizes[0]))
    for start in range(0, box.sizes[0], rows):
        yield Box((start, *(0 for _ in box.sizes[1:])), (min(rows, box.sizes[0] - start), *box.sizes[1:]))


def _piece(tensor: Tensor, box: Box, shape: tuple[int, ...], piece: Box) -> int:
    values = tensor.detach()[piece.slices()].contiguous().cpu()
    values = torch.view_as_real(values) if values.is_complex() else values.unsqueeze(-1)
    bits = values.contiguous().view(_BITS[values.dtype.itemsize]).to(torch.int64, copy=True)
    indices = torch.zeros((), dtype=torch.int64)
    for dim, (offset, begin, size) in enumerate(zip(box.offsets, piece.offsets, piece.sizes, strict=True)):
        along = torch.arange(offset + begin, offset + begin + size) * math.prod(shape[dim + 1 :])
        indices = indices.unsqueeze(-1) + along
    indices = indices.unsqueeze(-1) * values.shape[-1] + torch.arange(values.shape[-1])
    mixed = indices.mul_(_FACTOR)
    mixed ^= (mixed >> 33) & (2**31 - 1)  # a logical shift: torch's shift of a signed word copies the sign
    return int(mixed.bitwise_or_(1).mul_(bits.mul_(2).add_(1)).sum()) % _WORD
