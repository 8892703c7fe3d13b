"""The order of samples: a keyed permutation evaluated at one index, in constant time and memory at any size.

A balanced Feistel network over the smallest even number of bits that holds the range, walked along its cycle until the
value falls inside the range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Round keys come from
(seed, epoch); the round function is the finalizer of MurmurHash3 (public domain), plenty for shuffling.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from disttrain.runtime.seeds import derive_seed

_ROUNDS = 6
_WINDOW = 1024
"""Positions that are evaluated at once and kept: arrays cost as much for a batch of 32, a tenth of a small step."""
_MASK = (1 << 64) - 1
_M1, _M2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53


class Order:
    """Positions 0 to size - 1 of an epoch, to indices 0 to size - 1 of the dataset. Sizes up to 2**62."""

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"an order is over 1 to 2**62 samples, not {size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        # At least three bits a half: with two, some orders of four samples come half as often again as they should.
        self._half = max(3, ((size - 1).bit_length() + 1) // 2)
        self._kept: tuple[int, int, NDArray[np.int64]] = (-1, -1, np.empty(0, dtype=np.int64))

    def index(self, epoch: int, position: int) -> int:
        """The sample at `position` of `epoch`: a bijection of 0..size-1 for every epoch."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of an order over {self.size} samples")
        if not self.shuffle:
            return position
        keys, half = _keys(self.seed, epoch), self._half
        mask = (1 << half) - 1
        value = position
        while True:
            left, right = value >> half, value & mask
            for key in keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            value = left << half | right
            if value < self.size:
                return value

    def indices(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        """`index` for positions start to start + count - 1, at once."""
        if start < 0 or start + count > self.size:
            raise IndexError(f"positions {start} to {start + count} of an order over {self.size} samples")
        if not self.shuffle:
            return np.arange(start, start + count, dtype=np.int64)
        first, within = divmod(start, _WINDOW)
        if within + count <= _WINDOW:
            return self._window(epoch, first)[within : within + count].copy()
        windows = range(first, -(-(start + count) // _WINDOW))
        parts = [self._window(epoch, window)[max(0, start - window * _WINDOW) :] for window in windows]
        return np.concatenate(parts)[:count]

    def _window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The indices of one window's positions; the last one asked for is kept."""
        if self._kept[:2] != (epoch, window):
            start = window * _WINDOW
            found = np.arange(start, min(start + _WINDOW, self.size), dtype=np.uint64)
            outside = np.ones(found.size, dtype=bool)
            while outside.any():
                found[outside] = self._permute(found[outside], _keys(self.seed, epoch))
                outside &= found >= np.uint64(self.size)
            self._kept = epoch, window, found.astype(np.int64)
        return self._kept[2]

    def _permute(self, value: NDArray[np.uint64], keys: tuple[int, ...]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = value >> half, value & mask
        for key in keys:
            mixed = right ^ np.uint64(key)
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(_M1)
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(_M2)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(33))) & mask)
        return left << half | right


def _mix(value: int) -> int:
    value = ((value ^ (value >> 33)) * _M1) & _MASK
    value = ((value ^ (value >> 33)) * _M2) & _MASK
    return value ^ (value >> 33)


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive_seed(seed, "order", epoch, number) for number in range(_ROUNDS))
