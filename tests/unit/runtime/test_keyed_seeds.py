"""Seeds are functions of their keys: equal on every machine and process, and different for different keys."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.runtime.seeds import (
    derive_seed,
    generators_for,
    restored_generators,
    seed_everything,
    seed_item,
    seed_torch,
)

KEYS = st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=60)), max_size=5)


def by_hand(*keys: int | str) -> int:
    """BLAKE2b of each key's length, kind and bytes; the lowest bit of 64 is dropped."""
    text = b""
    for key in keys:
        raw = key.encode() if isinstance(key, str) else struct.pack("<q", key)
        text += bytes([len(raw) % 256]) + (b"\0" if isinstance(key, str) else b"\1") + raw
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


@given(st.integers(0, 2**63 - 1), KEYS)
def test_a_seed_is_the_hash_of_its_keys(seed: int, keys: list[Any]) -> None:
    found = derive_seed(seed, *keys)
    assert found == by_hand(seed, *keys)
    assert 0 <= found < 2**63


@pytest.mark.parametrize(
    ("keys", "seed"),
    [
        ((1234, "order", 0, 0), 1575811453128900312),
        ((0,), 586585486359008786),
        ((7, "init", "layers.0.weight"), 271784154244180888),
    ],
)
def test_a_seed_never_changes(keys: tuple[Any, ...], seed: int) -> None:
    """Another value would change the order, weights and dropout of every run that a user resumes."""
    assert derive_seed(*keys) == by_hand(*keys) == seed


def test_keys_that_look_alike_have_different_seeds() -> None:
    text, number = "\1\1\1\1\1\1\1\1", 0x0101010101010101  # the same eight bytes
    alike: list[tuple[Any, ...]] = [
        *[(0,), (1,), (0, 0), (0, "0"), (0, "00"), (0, "0", "0"), (0, "a", "b"), (0, "ab"), (0, "b", "a")],
        *[(0, ""), (0, "", ""), (0, 1, 2), (0, 2, 1), (1, 0, 2), (0, -1), (0, text), (0, number)],
    ]
    assert len({derive_seed(*keys) for keys in alike}) == len(alike)
    many = {derive_seed(3, "item", epoch, index) for epoch, index in itertools.product(range(50), range(400))}
    assert len(many) == 20_000


def test_another_process_with_another_hash_seed_computes_the_same() -> None:
    code = (
        "from disttrain.runtime.seeds import *; import torch\n"
        "print(derive_seed(9, 'a', 1), torch.rand(3, generator=generators_for(9)('w')).tolist())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        ).stdout
        for hash_seed in ("1", "2")
    }
    here = torch.rand(3, generator=torch.Generator().manual_seed(by_hand(9, "init", "w"))).tolist()
    assert found == {f"{by_hand(9, 'a', 1)} {here}\n"}


def test_a_name_has_its_generator_in_any_order_and_with_any_others() -> None:
    names = ["a", "b", "layers.0.weight"]

    def drawn(order: list[str]) -> dict[str, list[float]]:
        generator_for = generators_for(5)
        return {name: torch.rand(2, generator=generator_for(name)).tolist() for name in order}

    expected = {
        name: torch.rand(2, generator=torch.Generator().manual_seed(by_hand(5, "init", name))).tolist()
        for name in names
    }
    assert drawn(names) == drawn(names[::-1]) == expected
    assert drawn(["b"])["b"] == expected["b"]
    assert len({str(value) for value in expected.values()}) == 3


@pytest.mark.parametrize("act", ["item", "collate"])
def test_an_item_sets_all_three_generators(act: str) -> None:
    key = by_hand(3, act, 2, 17)
    torch.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)
    expected = draws()
    seed_item(3, 2, 17, act)
    assert draws() == expected
    seed_item(3, 2, 18, act)
    other = draws()
    assert all(a != b for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize(
    "seed",
    [lambda: seed_everything(11), lambda: (seed_torch(11), np.random.seed(11), random.seed(11))],
    ids=["seed_everything", "seed_torch"],
)
def test_a_seed_has_the_meaning_of_a_plain_script(seed: Callable[[], Any]) -> None:
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    expected = draws()
    seed()
    assert draws() == expected


def test_seeds_beyond_numpys_range_are_reduced_for_numpy_only() -> None:
    seed_everything(2**63 - 1)
    found = draws()
    np.random.seed(2**32 - 1)
    assert found[1] == np.random.rand()


def test_the_largest_seeds_are_accepted_and_larger_ones_are_not() -> None:
    seed_item(2**63 - 1, 0, 2**62)
    with pytest.raises(struct.error):
        derive_seed(2**63)


@pytest.mark.parametrize("fails", [False, True])
def test_generators_are_restored(fails: bool) -> None:
    seed_everything(4)
    np.random.standard_normal()  # numpy keeps a second normal number, which is part of its state
    with restored_generators():
        pass
    expected = (*draws(), float(np.random.standard_normal()))
    seed_everything(4)
    np.random.standard_normal()
    try:
        with restored_generators():
            seed_item(1, 1, 1)
            np.random.standard_normal()
            draws()
            if fails:
                raise KeyError("user code")
    except KeyError:
        assert fails
    assert (*draws(), float(np.random.standard_normal())) == expected
