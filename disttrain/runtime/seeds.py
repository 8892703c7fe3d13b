"""Randomness as a function of keys: who draws, where and how often never matters, only what it is drawn for.

Owns the derivation of 64-bit seeds from (seed, words and numbers) and the setting of generators from them.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

GeneratorFor = Callable[[str], torch.Generator]
"""Maps a parameter's or buffer's name to its own CPU generator."""


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from `seed` and `keys`, equal on every machine and in every process (BLAKE2b, RFC 7693)."""
    raw = b"".join([_NUMBER(8, True, key) if isinstance(key, int) else _word(key) for key in (seed, *keys)])
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1


_NUMBER = struct.Struct("<B?q").pack
"""A key's length, whether it is a number, and the number: keys of other kinds or lengths never read alike."""


@lru_cache(maxsize=4096)
def _word(key: str) -> bytes:
    raw = key.encode()
    return struct.pack("<B?", len(raw) % 256, False) + raw


def generators_for(seed: int) -> GeneratorFor:
    """One CPU generator per name, keyed by (seed, name): weights can then be drawn in any order, or in part."""

    def generator_for(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, "init", name))

    return generator_for


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """Set torch's default generator on the CPU, and on `device` if it has its own. Local.

    torch.manual_seed walks every backend (80 microseconds measured); this sets the two that a step can use (1).
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def seed_everything(seed: int) -> None:
    """What a careful single-process script does first: torch on all devices, numpy and Python. Local."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_all(key: int, device: torch.device | None = None) -> None:
    """Set torch's generators as `seed_torch` does, numpy's and Python's. Local; 11 microseconds measured."""
    seed_torch(key, device)
    np.random.seed(key % 2**32)
    random.seed(key)


def seed_item(seed: int, epoch: int, index: int, act: str = "item") -> None:
    """Set torch's, numpy's and Python's generators from (seed, epoch, index), before that item is fetched. Local.

    Another `act` on the same item (`collate`: on the batch that it begins) has draws of its own.
    """
    seed_all(derive_seed(seed, act, epoch, index))


@contextmanager
def restored_generators() -> Iterator[None]:
    """Put torch's CPU generator, numpy's and Python's back as they were found."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Where this process's generators stand: `torch`, `cuda` where `device` is one, `numpy`, `python`. Local.

    Vectors of one length each, uint8 or int64; a pending second normal number is kept by its bits.
    """
    _, keys, place, pending, number = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
    version, words, waiting = random.getstate()
    assert version == 3, f"Python's generator has a state of version {version}"
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), place, pending, _bits(number)]),
        "python": torch.tensor([*words, waiting is not None, _bits(waiting or 0.0)]),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put this process's generators where `generator_states` found them; those not named stay. Local."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        *keys, place, pending, number = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, pending, _number(number)))
    if "python" in states:
        *words, waits, number = states["python"].tolist()
        random.setstate((3, tuple(words), _number(number) if waits else None))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
