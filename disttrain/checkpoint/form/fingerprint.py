"""A tensor's checksum that does not depend on how it is cut: every rank adds up its boxes, and the sums are added.

Element i (row-major in the whole tensor) with the bits b counts `odd(mix(i)) * (2 b + 1)` modulo 2^64, `mix` being a
round of MurmurHash3's finalizer (public domain). One changed element always changes the sum: an odd number times a
difference is not zero. Against mistakes, not against malice. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box
from disttrain.checkpoint.form.shards import Shard

_PIECE = 2**16
"""Elements that are looked at at once: temporaries of half a MiB stay in a core's cache."""
_WORD = 2**64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = -0xAE502812AA7333  # 0xFF51AFD7ED558CCD as a signed word


def combine_fingerprints(parts: Iterable[int]) -> int:
    """The fingerprint of a tensor from those of its boxes."""
    return sum(parts) % _WORD


def fingerprint(shard: Shard) -> int:
    """What one box adds to its tensor's fingerprint: a 64-bit number. Local; holds a few MiB."""
    return combine_fingerprints(_piece(shard.tensor, shard.box, shard.shape, piece) for piece in _pieces(shard.box))


def _pieces(box: Box) -> Iterator[Box]:
    """Boxes of a local tensor, of about `_PIECE` elements where its rows are smaller than that."""
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
    places = torch.zeros((), dtype=torch.int64)
    for dim, (offset, begin, size) in enumerate(zip(box.offsets, piece.offsets, piece.sizes, strict=True)):
        along = torch.arange(offset + begin, offset + begin + size) * math.prod(shape[dim + 1 :])
        places = places.unsqueeze(-1) + along
    places = places.unsqueeze(-1) * values.shape[-1] + torch.arange(values.shape[-1])
    mixed = places.mul_(_FACTOR)
    mixed ^= (mixed >> 33) & (2**31 - 1)  # zeros come in: torch's own shift of a signed word copies the sign
    return int(mixed.bitwise_or_(1).mul_(bits.mul_(2).add_(1)).sum()) % _WORD
