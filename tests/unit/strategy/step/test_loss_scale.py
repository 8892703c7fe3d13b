"""The loss scale compared with torch's GradScaler, and its rejections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import LaunchError, TrainingError
from disttrain.runtime import Device, check_device
from disttrain.strategy.step.loss_scale import INTERVAL, LossScale


def grad_scaler(finite: list[bool]) -> list[float]:
    """The scales of torch's GradScaler before each of these steps, and after the last."""
    scaler = torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scales = []
    for good in finite:
        scaler.scale(parameter.sum() * (1.0 if good else torch.inf)).backward()
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [*scales, scaler.get_scale()]


def disttrain_scales(finite: list[bool]) -> list[float]:
    scale, scales = LossScale(), []
    for good in finite:
        scales.append(scale.factor(divided=True))
        scale.update(finite=good, weight=3.0)
    return [*scales, scale.value]


@pytest.mark.parametrize(
    "finite",
    [
        [False, True, False, False, True],
        [True] * INTERVAL + [False, True],
        [True] * (INTERVAL - 1) + [False] + [True] * INTERVAL + [True],
    ],
    ids=["skips", "grows", "a skip counts anew"],
)
def test_changes_like_torchs_grad_scaler(finite: list[bool]) -> None:
    assert disttrain_scales(finite) == grad_scaler(finite)


def test_a_scale_of_zero_is_an_error() -> None:
    scale = LossScale()
    for _ in range(16):
        scale.update(finite=False, weight=1.0)
    assert scale.value == 1.0
    with pytest.raises(TrainingError, match="not finite at a scale of 1"):
        scale.update(finite=False, weight=1.0)


@given(st.floats(1e-6, 1e12), st.floats(1e-6, 1e12))
def test_a_summed_loss_is_scaled_as_its_mean_within_a_factor_of_two(before: float, weight: float) -> None:
    scale = LossScale()
    scale.update(finite=True, weight=before)
    assert 0.7 < scale.factor(divided=False) * before / scale.value < 1.5
    scale.expect(weight)
    assert 0.7 < scale.factor(divided=False) * weight / scale.value < 1.5
    # A power of two: multiplying and then dividing by it changes no bit.
    assert torch.frexp(torch.tensor(scale.factor(divided=False), dtype=torch.float64)).mantissa == 0.5
    kept = scale.factor(divided=False)
    scale.expect(0.0)  # a step without weight gives no information
    assert scale.factor(divided=False) == kept


def test_a_cpu_has_no_fp16() -> None:
    with pytest.raises(LaunchError, match=r"precision\.compute=bf16") as caught:
        check_device(Device(torch.device("cpu"), "gloo", 1), compute="fp16", compiles=False)
    assert caught.value.exit_code == 3
    check_device(Device(torch.device("cuda", 0), "nccl", 1), compute="fp16", compiles=False)
