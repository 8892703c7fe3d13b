"""Computes CRC-32 (the one of zlib and gzip, ISO 3309) as fast as the processor allows.

isal reaches 14 GiB/s where zlib reaches 2 to 3 GiB/s, with equal results. Both release the GIL during the computation.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # isal does not support this processor
    from zlib import crc32

__all__ = ["crc32"]
