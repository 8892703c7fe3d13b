"""A step compared with a plain one, whether gradients are scaled in a fused kernel or before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disttrain.optim.named import NamedParameter
from disttrain.strategy import Prepared, StepSums
from disttrain.strategy.step.update import torch_step

WEIGHT, CLIP = 37.0, 0.25


class OwnAdam(torch.optim.AdamW):
    """A subclass whose step may read gradients, which must be scaled by then."""


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "a subclass": lambda p: OwnAdam(p, lr=0.1, fused=True),
}


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def summed_loss(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
    total: Tensor = net(x).square().sum() * WEIGHT
    return total


def prepared_with(make: Callable[[Any], Optimizer], dtype: torch.dtype) -> Prepared:
    net = model(dtype)
    named = tuple(NamedParameter(name, one, one.shape) for name, one in net.named_parameters())
    return Prepared("model", net, named=named, optimizer=make(net.parameters()))


def step_once(prepared: Prepared) -> None:
    sums = StepSums({"loss": 1.0}, {"loss": WEIGHT}, {}, (), WEIGHT)
    assert torch_step(prepared, sums, clip_norm=CLIP, want_norm=True).applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_a_plain_step(name: str, dtype: torch.dtype) -> None:
    prepared, plain = prepared_with(OPTIMIZERS[name], dtype), model(dtype)
    optimizer = OPTIMIZERS[name](plain.parameters())
    for step in range(5):
        summed_loss(prepared.model, step).backward()
        step_once(prepared)
        (summed_loss(plain, step) / WEIGHT).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    within = 1e-6 if dtype == torch.float32 else 1e-13
    for mine, theirs in zip(prepared.model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine, theirs, rtol=within, atol=within)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_before_the_step_sees_scaled_gradients(everywhere: bool) -> None:
    prepared = prepared_with(OPTIMIZERS["fused AdamW"], torch.float32)
    seen: list[float] = []

    def look(optimizer: Optimizer, *_: Any) -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in prepared.model.parameters()])))

    assert prepared.optimizer is not None
    handle = register_optimizer_step_pre_hook(look) if everywhere else prepared.optimizer.register_step_pre_hook(look)
    try:
        summed_loss(prepared.model, 0).backward()
        step_once(prepared)
    finally:
        handle.remove()
    assert seen == pytest.approx([CLIP], rel=1e-4)
