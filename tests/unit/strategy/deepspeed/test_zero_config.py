"""DeepSpeed's memory settings, and the prefetcher's rules as the memory formula simulates them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from benchmarks.zero_gathers import play
from disttrain.config.schema import PrecisionConfig
from disttrain.strategy.deepspeed.config import bound_gathered, engine_config
from disttrain.strategy.deepspeed.construction import largest_module


def config_of(stage: int, **given: Any) -> dict[str, Any]:
    defaults = {"offload": "none", "offload_parameters": "none", "nvme_path": None, "bucket_mb": None, "native": None}
    return engine_config(SimpleNamespace(stage=stage, **{**defaults, **given}), PrecisionConfig(), "cpu")


def test_stage_three_has_no_buffer_for_gradients_that_it_copies_anyway() -> None:
    found = {stage: config_of(stage)["zero_optimization"]["contiguous_gradients"] for stage in (1, 2, 3)}
    assert found == {1: True, 2: True, 3: False}


def test_gathered_parameters_are_bounded_by_a_bucket_and_the_largest_module() -> None:
    zero = bound_gathered(config_of(3, bucket_mb=1.0), 1000)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == 2**18 + 1000
    asked = {"zero_optimization": {"stage3_max_live_parameters": 7}}
    assert bound_gathered(config_of(3, native=asked), 1000)["zero_optimization"]["stage3_max_live_parameters"] == 7


def test_the_largest_module_counts_its_own_parameters_not_its_childrens() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 5)))
    assert largest_module(model, None) == 10 * 12 + 12
    assert largest_module(model, nn.Linear(100, 3, bias=False)) == 300


def test_the_prefetcher_gathers_a_bucket_ahead_and_never_beyond_its_bound() -> None:
    sizes = dict.fromkeys("abcdef", 20_000)
    found = play("abcdef", sizes, bucket=30_000, bound=70_000)
    # b and c share a buffer, which is freed when c, its last, is used. So do d and e. f gets the remaining space alone.
    assert [one.held for one in found] == [60_000, 120_000, 80_000, 100_000, 40_000, 20_000]
    assert [one.in_flight for one in found] == [40_000, 40_000, 60_000, 20_000, 20_000, 0]
