"""Precisions and memory savers that can be combined. Every other combination is rejected by key."""

from __future__ import annotations

import itertools

import pytest

from disttrain.config import load_config
from disttrain.errors import ConfigError

# compute: (masters, reductions). The first of each is the default.
ALLOWED = {
    "fp64": (["fp64"], ["fp64"]),
    "fp32": (["fp32"], ["fp32", "bf16"]),
    "bf16": (["fp32", "bf16"], ["fp32", "bf16"]),
    "fp16": (["fp32"], ["fp32"]),
}


@pytest.mark.parametrize("compute", list(ALLOWED))
def test_each_precision_has_its_masters_and_reductions(compute: str) -> None:
    masters, reductions = ALLOWED[compute]
    left_out = load_config({"precision": {"compute": compute}}).precision
    assert (left_out.master, left_out.reduce) == (masters[0], reductions[0])
    for master, reduce in itertools.product(["fp64", "fp32", "bf16"], repeat=2):
        asked = {"precision": {"compute": compute, "master": master, "reduce": reduce}}
        wrong = [
            key
            for key, value, known in (("master", master, masters), ("reduce", reduce, reductions))
            if value not in known
        ]
        if not wrong:
            found = load_config(asked).precision
            assert (found.master, found.reduce) == (master, reduce)
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(asked)
        for key in wrong:
            assert f"precision.{key}" in str(caught.value)
            assert f"under precision.compute={compute}" in str(caught.value)


def test_pure_bf16_accumulates_gradients_in_float32_by_default() -> None:
    assert load_config({"precision": {"compute": "bf16", "master": "bf16"}}).precision.reduce == "fp32"


@pytest.mark.parametrize(
    ("memory", "do"),
    [
        ({"recompute": "budget"}, "set memory.compile=true"),
        ({"recompute": "selective", "compile": True}, "set memory.recompute=budget"),
        ({"recompute": "budget", "compile": True, "budget": 1.5}, "memory.budget"),
        ({"recompute": "some"}, "memory.recompute"),
    ],
)
def test_memory_savers_that_cannot_be_combined(memory: dict[str, object], do: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"memory": memory})
    assert do in str(caught.value)


@pytest.mark.parametrize("recompute", ["none", "full", "budget"])
def test_memory_savers_under_compile(recompute: str) -> None:
    assert load_config({"memory": {"recompute": recompute, "compile": True}}).memory.compile
