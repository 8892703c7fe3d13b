"""The order of samples is a bijection at any size, evaluated at one position in constant time, and well shuffled."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from data_parts import keyed_seed
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import Order

VAST = 10**10
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**40)


def plain_index(size: int, seed: int, epoch: int, position: int) -> int:
    """Six rounds of a balanced Feistel network, walked until the value falls inside (Black and Rogaway 2002)."""
    bits = 3
    while 4**bits < size:
        bits += 1
    while True:
        left, right = divmod(position, 2**bits)
        for number in range(6):
            word = right ^ keyed_seed(seed, "order", epoch, number)
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):  # MurmurHash3's fmix64
                word = (word ^ word >> 33) * factor % 2**64
            left, right = right, left ^ (word ^ word >> 33) % 2**bits
        position = left * 2**bits + right
        if position < size:
            return position


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def six_sigma(freedom: int) -> tuple[float, float]:
    """A chi-square variable has mean `freedom` and variance twice that.

    Seeds are fixed, so the outcome never changes.
    """
    return freedom - 6 * math.sqrt(2 * freedom), freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("epoch", [0, 3, 10**9])
@pytest.mark.parametrize("position", [0, 1, 4_999_999_999, VAST - 1])
def test_an_index_of_ten_billion_costs_no_more_than_one_of_ten_thousand(epoch: int, position: int) -> None:
    # fills the same share of 2**14 as ten billion does of 2**34, so that equally many values are walked again
    few = 9537
    took: dict[int, list[float]] = {VAST: [], few: []}
    for more in range(7):  # each index in a new epoch, because keys are derived once per epoch
        for size, times in took.items():
            started = time.process_time()
            (index,) = Order(size, seed=5).indices(epoch + more, position % size, 1)
            times.append(time.process_time() - started)
            assert 0 <= index < size
    # a busy machine disturbs both; a list would cost a million times as much
    assert min(took[VAST]) < 4 * min(took[few]), took


def test_no_memory_grows_with_size_epochs_or_positions() -> None:
    order = Order(VAST, seed=5)
    generator = np.random.default_rng(0)
    places = list(enumerate(generator.integers(VAST, size=3500).tolist()))
    for epoch, position in places[:2500]:  # Python keeps up to 2000 freed tuples, and counts them as memory
        order.indices(epoch, position, 1)
    tracemalloc.start()
    try:
        for epoch, position in places[2500:3000]:
            order.indices(epoch, position, 1)
        early = tracemalloc.get_traced_memory()[0]
        for epoch, position in places[3000:]:
            order.indices(epoch, position, 1)
        late, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000, "bytes; a list of ten billion would be 80 GB"
    assert late - early < 10_000, "bytes, over 500 more epochs"


def test_every_small_size_is_a_bijection() -> None:
    for size in range(1, 2001):
        found = Order(size, seed=11).indices(epoch=size % 3, start=0, count=size)
        assert np.array_equal(np.sort(found), np.arange(size)), size


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), SEEDS, EPOCHS)
def test_every_seed_and_epoch_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(Order(size, seed).indices(epoch, 0, size).tolist()) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 2**62), SEEDS, EPOCHS)
def test_the_order_is_that_of_the_paper_at_any_size(data: st.DataObject, size: int, seed: int, epoch: int) -> None:
    # With few samples most walks are long. With 2**62 the arithmetic reaches the last bit.
    size = data.draw(st.sampled_from([1, 2, 3, 15, 16, 17, 257, VAST, 2**62 - 1, 2**62, size]))
    start = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(0, min(40, size - start)))
    order = Order(size, seed)
    expected = [plain_index(size, seed, epoch, start + k) for k in range(count)]
    assert order.indices(epoch, start, count).tolist() == expected


@given(st.integers(1, 50), EPOCHS)
def test_without_shuffle_the_order_is_that_of_the_dataset(size: int, epoch: int) -> None:
    order = Order(size, seed=1, shuffle=False)
    assert order.indices(epoch, 0, size).tolist() == list(range(size))


def test_epochs_and_seeds_have_different_orders() -> None:
    size, places = 1000, list(itertools.product(range(6), range(6)))
    orders = [Order(size, seed).indices(epoch, 0, size) for seed, epoch in places]
    equal = [int((a == b).sum()) for a, b in itertools.combinations(orders, 2)]
    # Two random orders agree at one position on average (Poisson): 630 pairs sum to 630, plus or minus six times 25.
    assert max(equal) < 12
    assert abs(sum(equal) - len(equal)) < 6 * math.sqrt(len(equal))


@pytest.mark.slow
def test_every_arrangement_of_four_is_equally_likely() -> None:
    seen = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        seen[tuple(Order(4, seed=2).indices(epoch, 0, 4).tolist())] += 1
    low, high = six_sigma(23)
    assert max(0, low) < chi_square(np.array(list(seen.values()))) < high


@pytest.mark.parametrize("size", [2, 5, 20, 64])
def test_every_sample_is_equally_likely_at_every_position(size: int) -> None:
    epochs = 2000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), Order(size, seed=3).indices(epoch, 0, size)] += 1
    freedom = (size - 1) ** 2  # rows and columns each sum to `epochs`, and the statistic is scaled for that
    low, high = six_sigma(freedom)
    assert max(0, low) <= chi_square(counts) * (size - 1) / size < high
    # Samples in the middle at every position: a mean over 2000 epochs, each with a uniform's standard deviation.
    means = counts @ np.arange(size) / epochs
    assert np.abs(means - (size - 1) / 2).max() < 6 * math.sqrt((size**2 - 1) / 12 / epochs)


def test_samples_stay_in_place_or_adjacent_only_by_chance() -> None:
    size, epochs = 1000, 400
    orders = [Order(size, seed=4).indices(epoch, 0, size) for epoch in range(epochs)]
    bound = 6 * math.sqrt(epochs)  # both counts are Poisson with mean one per epoch
    assert abs(sum(int((order == np.arange(size)).sum()) for order in orders) - epochs) < bound
    assert abs(sum(int((np.diff(order) == 1).sum()) for order in orders) - epochs) < bound


def test_the_first_positions_of_ten_billion_are_spread_over_the_range() -> None:
    first = Order(VAST, seed=6).indices(2, 0, 20_000)
    assert len(set(first.tolist())) == 20_000
    low, high = six_sigma(63)
    assert low < chi_square(np.bincount(first * 64 // VAST, minlength=64)) < high
    correlation = np.corrcoef(np.arange(20_000), first)[0, 1]
    assert abs(correlation) < 6 / math.sqrt(20_000)


def test_positions_outside_the_range_are_rejected() -> None:
    order = Order(10, seed=0)
    for start, count in ((-1, 1), (10, 1), (-1, 2), (9, 2)):
        with pytest.raises(IndexError, match="10 samples"):
            order.indices(0, start, count)
    for size in (0, 2**62 + 1):
        with pytest.raises(ValueError, match=str(size)):
            Order(size, seed=0)
