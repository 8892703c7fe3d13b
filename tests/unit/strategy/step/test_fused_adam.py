"""The fused kernel equals `Optimizer.step` bit for bit, and is not used where the result could differ."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from disttrain.strategy.step.fused_adam import FusedAdam

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = ((5, 7), (3,), (1,), (4, 2, 3), (0, 6))


class Twins:
    """The same parameters twice: stepped by the kernel when it is ready, and by the optimizer alone."""

    def __init__(
        self, make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self._draws = torch.Generator().manual_seed(3)
        self.mine = [nn.Parameter(torch.randn(shape, generator=self._draws).to(device, dtype)) for shape in SHAPES]
        self.theirs = copy.deepcopy(self.mine)
        self.optimizer, self.plain = make(self.mine), make(self.theirs)
        self.fused = FusedAdam(self.optimizer, self.mine)

    def step(self, divisor: float | None = None) -> bool:
        """Take both steps on the same gradients. Returns whether the kernel was used."""
        for one, other in zip(self.mine, self.theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=self._draws).to(one)
            other.grad = one.grad.clone()
        by = None if divisor is None else torch.tensor(divisor, device=self.mine[0].device)
        gradients: list[Any] = [one.grad for one in self.mine]
        with torch.no_grad():
            taken = self.fused.ready(gradients, gradients[0].dtype)
            if taken:
                self.fused.step(gradients, by)
            else:
                self._custom_step(self.optimizer, by)
            self._custom_step(self.plain, by)
        return taken

    @staticmethod
    def _custom_step(optimizer: Any, divisor: Any) -> None:
        optimizer.grad_scale = divisor
        optimizer.step()
        optimizer.grad_scale = None

    def assert_equal(self) -> None:
        """Weights and state, bit for bit."""
        for one, other in zip(self.mine, self.theirs, strict=True):
            assert torch.equal(one, other)
            for name, value in self.plain.state[other].items():
                assert torch.equal(self.optimizer.state[one][name], value), name


def apart(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [parameters[3], parameters[0], parameters[4]], "weight_decay": 0.3},
        {"params": [parameters[2]], "lr": 0.2, "betas": (0.5, 0.9)},
        {"params": [parameters[1]], "maximize": True, "eps": 1e-3},
    ]


MAKES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda own: AdamW(own, lr=0.1, fused=True),
    "Adam": lambda own: Adam(own, lr=0.1, weight_decay=0.2, fused=True),
    "groups": lambda own: AdamW(apart(own), lr=0.1, fused=True),
    "decoupled Adam": lambda own: Adam(own, lr=0.1, weight_decay=0.2, decoupled_weight_decay=True, fused=True),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("divisor", [None, 0.37])
@pytest.mark.parametrize("name", MAKES)
def test_the_same_bits(name: str, divisor: float | None, dtype: torch.dtype, device: str) -> None:
    twins = Twins(MAKES[name], dtype, device)
    assert [twins.step(divisor if dtype == torch.float32 else None) for _ in range(5)] == [False, *[True] * 4]
    twins.assert_equal()


def moved(twins: Twins) -> None:
    """As in scripts that keep state on another device for a while."""
    for row in twins.optimizer.state.values():
        row.update({key: value.clone() for key, value in row.items()})


def loaded(twins: Twins) -> None:
    twins.optimizer.load_state_dict(copy.deepcopy(twins.optimizer.state_dict()))


def replaced(twins: Twins) -> None:
    for one in twins.mine:
        twins.optimizer.state[one] = {key: value.clone() for key, value in twins.optimizer.state[one].items()}


def other_rates(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.param_groups[0].update(lr=0.03, betas=(0.8, 0.97), weight_decay=0.5, eps=1e-4)


def scheduled(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        LambdaLR(optimizer, lambda _: 0.5)


def frozen(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def frozen_in_place(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.param_groups[0]["params"].pop()


@pytest.mark.parametrize("act", [moved, loaded, replaced, other_rates, scheduled, frozen, frozen_in_place])
def test_follows_what_happens_to_state_and_groups(act: Callable[[Twins], None]) -> None:
    twins = Twins(MAKES["groups"])
    for _ in range(3):
        twins.step()
    act(twins)
    assert [twins.step(), twins.step()] == [True, True]
    twins.assert_equal()


def hook(twins: Twins) -> Any:
    return twins.optimizer.register_step_post_hook(lambda *_: None)


def hook_before(twins: Twins) -> Any:
    return twins.optimizer.register_step_pre_hook(lambda *_: None)


def hook_everywhere(twins: Twins) -> Any:
    return register_optimizer_step_post_hook(lambda *_: None)


def hook_before_everywhere(twins: Twins) -> Any:
    return register_optimizer_step_pre_hook(lambda *_: None)


def custom_step(twins: Twins) -> None:
    step = twins.optimizer.step
    twins.optimizer.step = lambda *given: step(*given)  # type: ignore[method-assign]


def custom_step_then_schedule(twins: Twins) -> None:
    def step(self: Any) -> None:
        AdamW.step(self)

    twins.optimizer.step = step.__get__(twins.optimizer)  # type: ignore[method-assign]
    scheduled(twins)


def rate_tensor(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


def state_gone(twins: Twins) -> None:
    twins.optimizer.state.pop(twins.mine[1])
    twins.plain.state.pop(twins.theirs[1])


def more_parameters(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        more = nn.Parameter(torch.ones(2))
        more.grad = torch.ones(2)
        optimizer.add_param_group({"params": [more]})


def not_fused(twins: Twins) -> None:
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.param_groups[0].update(fused=False)


ENDS = [
    *(hook, hook_before, hook_everywhere, hook_before_everywhere, custom_step, custom_step_then_schedule),
    *(rate_tensor, state_gone, more_parameters, not_fused),
]


@pytest.fixture
def _hooks_removed() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("act", ENDS)
def test_falls_back_to_the_optimizer(act: Callable[[Twins], Any], _hooks_removed: list[Any]) -> None:
    twins = Twins(MAKES["AdamW"])
    for _ in range(3):
        twins.step()
    handle = act(twins)
    if handle is not None:
        _hooks_removed.append(handle)
    assert not twins.step()
    twins.assert_equal()


def test_falls_back_under_a_profiler() -> None:
    twins = Twins(MAKES["AdamW"])
    twins.step()
    with torch.profiler.profile() as profile:
        assert not twins.step()
    assert any(event.key == "Optimizer.step#AdamW.step" for event in profile.key_averages())
    assert twins.step()
    twins.assert_equal()


@pytest.mark.parametrize("wrapped", [False, True])
def test_falls_back_if_the_class_has_another_step(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = AdamW.step

    def step(self: Any, closure: Any = None) -> Any:
        return inner(self, closure)

    monkeypatch.setattr(AdamW, "step", functools.wraps(inner)(step) if wrapped else step)
    twins = Twins(MAKES["AdamW"])
    assert [twins.step() for _ in range(3)] == [False] * 3
    twins.assert_equal()


def test_a_later_schedule_counts_the_step() -> None:
    twins = Twins(MAKES["AdamW"])
    twins.step()
    schedule = LambdaLR(twins.optimizer, lambda _: 0.5)
    assert twins.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_state_of_another_size_is_left_to_torch() -> None:
    twins = Twins(MAKES["AdamW"])
    twins.step()
    twins.optimizer.state[twins.mine[0]]["exp_avg"] = torch.zeros(2)
    twins.optimizer.state[twins.mine[0]] = dict(twins.optimizer.state[twins.mine[0]])
    gradients = [one.grad for one in twins.mine if one.grad is not None]
    assert not twins.fused.ready(gradients, torch.float32)


class OwnAdam(AdamW):
    """A subclass, whose step may differ."""


NEVER: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "not fused": lambda own: AdamW(own, lr=0.1, foreach=True),
    "amsgrad": lambda own: AdamW(own, lr=0.1, amsgrad=True, fused=True),
    "capturable": lambda own: AdamW(own, lr=0.1, capturable=True, fused=True),
    "a subclass": lambda own: OwnAdam(own, lr=0.1, fused=True),
    "another optimizer": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", NEVER)
def test_ignores_other_optimizers(name: str) -> None:
    twins = Twins(NEVER[name])
    assert [twins.step() for _ in range(3)] == [False] * 3
    twins.assert_equal()


def test_ignores_several_dtypes() -> None:
    twins = Twins(MAKES["AdamW"])
    for parameters in (twins.mine, twins.theirs):
        parameters[0].data = parameters[0].data.double()
    assert [twins.step() for _ in range(3)] == [False] * 3
    twins.assert_equal()
