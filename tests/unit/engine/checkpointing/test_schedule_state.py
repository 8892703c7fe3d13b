"""The state of every torch schedule survives JSON bit-equal, also with other parameter groups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from disttrain.engine.checkpointing.optimizer_groups import optimizer_document, restore_optimizer
from disttrain.errors import CheckpointError
from disttrain.strategy import Prepared

MakeSchedule = Callable[[Optimizer], LRScheduler]
STEPS, HALF = 24, 9


def of_groups(optimizer: Optimizer, factor: float) -> list[float]:
    return [group["lr"] * factor for group in optimizer.param_groups]


SCHEDULES: dict[str, MakeSchedule] = {
    "step": lambda o: StepLR(o, 3, gamma=0.7),
    "multi_step": lambda o: MultiStepLR(o, [4, 7, 7, 12, 20], gamma=0.3),
    "exponential": lambda o: ExponentialLR(o, 0.93),
    "one_cycle": lambda o: OneCycleLR(o, max_lr=of_groups(o, 5), total_steps=STEPS + 1),
    "three_phases": lambda o: OneCycleLR(o, max_lr=of_groups(o, 5), total_steps=STEPS + 1, three_phase=True),
    "cyclic": lambda o: CyclicLR(o, of_groups(o, 0.1), of_groups(o, 2), step_size_up=5, mode="exp_range", gamma=0.99),
    "cosine": lambda o: CosineAnnealingLR(o, 10, eta_min=1e-4),
    "warm_restarts": lambda o: CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "linear": lambda o: LinearLR(o, start_factor=0.1, total_iters=15),
    "polynomial": lambda o: PolynomialLR(o, total_iters=18, power=1.7),
    "multiplicative": lambda o: MultiplicativeLR(o, lambda step: 0.9 + 0.01 * (step % 3)),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, 0.2, total_iters=5), MultiStepLR(o, [2, 8]), ExponentialLR(o, 0.9)], [6, 15]
    ),
    "chained": lambda o: ChainedScheduler([MultiStepLR(o, [5, 11]), ExponentialLR(o, 0.95)]),
}


def prepare(
    make: MakeSchedule | None,
    groups: Sequence[Sequence[str]] = (("a", "b"), ("c",)),
    rates: Sequence[float] = (0.1, 0.02),
    make_optimizer: Callable[..., Optimizer] = AdamW,
) -> Prepared:
    """As a strategy prepares it: parameters by name in groups, and a rate for each group."""
    given = [
        {"params": [nn.Parameter(torch.ones(2)) for _ in names], "lr": rate}
        for names, rate in zip(groups, rates, strict=True)
    ]
    optimizer = make_optimizer(given)
    members = tuple(tuple(names) for names in groups)
    schedule = None if make is None else make(optimizer)
    return Prepared("model", nn.Linear(1, 1), optimizer=optimizer, members=members, schedule=schedule)


def advance(prepared: Prepared, steps: int) -> list[dict[str, tuple[Any, Any]]]:
    """For each of `steps` updates, the rate and momentum applied to each parameter."""
    optimizer, schedule, found = prepared.optimizer, prepared.schedule, []
    assert optimizer is not None and schedule is not None
    for _ in range(steps):
        by_name = {}
        for names, group in zip(prepared.members, optimizer.param_groups, strict=True):
            by_name |= dict.fromkeys(names, (float(group["lr"]), group.get("betas", group.get("momentum"))))
        found.append(by_name)
        optimizer.step()
        schedule.step()
    return found


def through_json(prepared: Prepared) -> Mapping[str, Any]:
    return json.loads(json.dumps(optimizer_document(prepared)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make_optimizer", [AdamW, lambda groups: SGD(groups, momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_continues_bit_for_bit(name: str, make_optimizer: Callable[..., Optimizer]) -> None:
    make = SCHEDULES[name]
    whole = advance(prepare(make, make_optimizer=make_optimizer), STEPS)
    first, second = (prepare(make, make_optimizer=make_optimizer) for _ in range(2))
    before = advance(first, HALF)
    restore_optimizer(second, through_json(first), same_settings=True)
    assert before + advance(second, STEPS - HALF) == whole
    assert len({step["a"] for step in whole}) > 2, "a rate that stands still shows nothing"


def test_values_in_a_schedule_keep_their_type() -> None:
    first, second = prepare(SCHEDULES["multi_step"]), prepare(SCHEDULES["multi_step"])
    restore_optimizer(second, through_json(first), same_settings=True)
    assert isinstance(second.schedule, MultiStepLR)
    assert isinstance(second.schedule.milestones, Counter)
    assert second.schedule.milestones == {4: 1, 7: 2, 12: 1, 20: 1}


ONE = (("a", "b", "c"),)
TOGETHER = (("a", "b"), ("c", "scale"))
APART = (("a", "b"), ("c",), ("scale",))
TURNED = (("scale", "c"), ("b", "a"))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("then", "now", "rates"),
    [
        (TOGETHER, APART, (0.1, 0.02)),
        (APART, TOGETHER, (0.1, 0.02)),
        (TOGETHER, TURNED, (0.1, 0.02)),
    ],
    ids=["divided", "joined", "turned"],
)
def test_regrouped_parameters_keep_their_rates(
    name: str, then: Sequence[Sequence[str]], now: Sequence[Sequence[str]], rates: tuple[float, float]
) -> None:
    def of(groups: Sequence[Sequence[str]]) -> Prepared:
        return prepare(SCHEDULES[name], groups, [rates["a" not in names] for names in groups])

    whole, first, second = advance(of(now), STEPS), of(then), of(now)
    before = advance(first, HALF)
    restore_optimizer(second, through_json(first), same_settings=True)
    assert before + advance(second, STEPS - HALF) == whole


def test_groups_of_different_settings_are_not_joined() -> None:
    first = prepare(SCHEDULES["step"])
    with pytest.raises(CheckpointError, match="2 saved groups that differ in initial_lr, lr"):
        restore_optimizer(prepare(SCHEDULES["step"], ONE, (0.1,)), through_json(first), same_settings=True)


def test_a_parameter_that_was_in_no_group_is_named() -> None:
    first = prepare(SCHEDULES["step"])
    other = prepare(SCHEDULES["step"], (("a", "b"), ("c", "new")))
    with pytest.raises(CheckpointError, match="no saved group holds new"):
        restore_optimizer(other, through_json(first), same_settings=True)


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    def make() -> Prepared:
        return prepare(SCHEDULES["exponential"], (("a",),), (torch.tensor(0.1),))  # type: ignore[arg-type]

    whole, first, second = advance(make(), 6), make(), make()
    before = advance(first, 3)
    restore_optimizer(second, through_json(first), same_settings=True)
    assert second.optimizer is not None and isinstance(second.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert before + advance(second, 3) == whole
