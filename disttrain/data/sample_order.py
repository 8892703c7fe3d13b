"""Shuffles samples with a keyed permutation that is evaluated at any position in constant time and memory.

The permutation is a balanced Feistel network over the smallest even number of bits that holds the range. A value
outside the range is permuted again until it falls inside (cycle walking: Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"). The round keys come from (seed, epoch). The round function is the finalizer of MurmurHash3
(public domain), which is sufficient for shuffling.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from disttrain.runtime.seeds import derive_seed

_ROUNDS = 6
_WINDOW = 1024
"""Positions evaluated together and cached. A batch of 32 costs as much as a window: a tenth of a small step."""
_M1, _M2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53


class Order:
    """Maps the positions 0 to size - 1 of an epoch to the indices 0 to size - 1 of a dataset. Local.

    The map is a bijection for each seed and epoch, and the identity if `shuffle` is false. Raises ValueError unless
    `size` is between 1 and 2**62.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"an order needs 1 to 2**62 samples, not {size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        # At least three bits per half: with two, some orders of four samples are 1.5 times as frequent as others.
        self._half = max(3, ((size - 1).bit_length() + 1) // 2)
        self._cached: tuple[int, int, NDArray[np.int64]] = (-1, -1, np.empty(0, dtype=np.int64))

    def indices(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        """Return the indices at the positions start to start + count - 1 of `epoch`, int64 of shape [count].

        Raises IndexError for positions outside 0 to size - 1.
        """
        if start < 0 or start + count > self.size:
            raise IndexError(f"positions {start} to {start + count} exceed an order of {self.size} samples")
        if not self.shuffle:
            return np.arange(start, start + count, dtype=np.int64)
        first, within = divmod(start, _WINDOW)
        if within + count <= _WINDOW:
            return self._window(epoch, first)[within : within + count].copy()
        windows = range(first, -(-(start + count) // _WINDOW))
        parts = [self._window(epoch, window)[max(0, start - window * _WINDOW) :] for window in windows]
        return np.concatenate(parts)[:count]

    def _window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return the indices of one window of positions. The last window is cached."""
        if self._cached[:2] != (epoch, window):
            start = window * _WINDOW
            values = np.arange(start, min(start + _WINDOW, self.size), dtype=np.uint64)
            outside = np.ones(values.size, dtype=bool)
            while outside.any():
                values[outside] = self._permute(values[outside], _keys(self.seed, epoch))
                outside &= values >= np.uint64(self.size)
            self._cached = epoch, window, values.astype(np.int64)
        return self._cached[2]

    def _permute(self, value: NDArray[np.uint64], keys: tuple[int, ...]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = value >> half, value & mask
        for key in keys:
            mixed = right ^ np.uint64(key)
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(_M1)
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(_M2)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(33))) & mask)
        return left << half | right


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive_seed(seed, "order", epoch, number) for number in range(_ROUNDS))
