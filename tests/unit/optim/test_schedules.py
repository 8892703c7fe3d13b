"""Learning rates at every step compared with independent formulas, and torch's schedulers with themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disttrain.config import resolve_target
from disttrain.errors import ConfigError
from disttrain.optim import schedule_factory
from disttrain.optim.schedules import as_steps

PEAK = 0.5
NAMES = ("constant", "linear", "cosine", "warmup_stable_decay")


def make_optimizer(*rates: float) -> Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates or (PEAK,)]
    return torch.optim.SGD(groups, lr=PEAK, momentum=0.9)


def build(target: str, args: dict[str, Any], *, total: int, optimizer: Optimizer | None = None) -> LRScheduler:
    make = resolve_target(target, section="schedule", folder=None)
    return schedule_factory(make, args, total_steps=total)(optimizer or make_optimizer())


def rates_of(schedule: LRScheduler, steps: int) -> list[float]:
    """The rate used by each of the next steps."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def expected_rates(name: str, *, total: int, warmup: int, decay: int, end: float, steps: int) -> list[float]:
    """Over the complete time axis at once: the warm-up by its two knots, the cosine as the square of half its angle."""
    at = np.arange(steps)
    start = {"constant": math.inf, "warmup_stable_decay": max(warmup, total - decay)}.get(name, warmup)
    done = np.clip((at - start) / max(total - start, 1), 0, 1) if start < math.inf else np.zeros(steps)
    left = np.cos(np.pi / 2 * done) ** 2 if name == "cosine" else 1 - done
    down = end + (1 - end) * left
    up = np.interp(at, [-1, warmup - 1], [0, 1]) if warmup else np.ones(steps)
    return list(PEAK * np.where(at < warmup, up, down))


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(1, 60))
    return {
        "total": total,
        "warmup": draw(st.integers(0, 80)),  # longer than the run, too
        "decay": draw(st.integers(0, 80)),
        "end": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }


def args_of(name: str, run: dict[str, Any]) -> dict[str, Any]:
    wanted = {"constant": ("warmup",), "warmup_stable_decay": ("warmup", "decay", "end")}.get(name, ("warmup", "end"))
    return {key: run[key] for key in wanted}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), runs())
@example("warmup_stable_decay", {"total": 10, "warmup": 6, "decay": 8, "end": 0.1})  # too short for a plateau
@example("warmup_stable_decay", {"total": 10, "warmup": 2, "decay": 3, "end": 0.0})
def test_every_step_has_the_closed_forms_rate(name: str, run: dict[str, Any]) -> None:
    found = rates_of(build(name, args_of(name, run), total=run["total"]), run["total"])
    # a few float64 roundings; the cosine of an angle near its end loses the most
    assert found == pytest.approx(expected_rates(name, **run, steps=run["total"]), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
def test_the_rate_is_at_its_peak_after_the_warmup_and_at_its_end_after_the_run(name: str) -> None:
    args = args_of(name, {"warmup": 4, "decay": 5, "end": 0.2})
    found = rates_of(build(name, args, total=20), 25)
    assert found[0] == PEAK / 4
    assert found[3] == found[4] == PEAK
    assert found[20:] == pytest.approx([PEAK * 0.2] * 5, rel=1e-14), "an own loop may go on"
    assert found[19] > PEAK * 0.2
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_warmup_longer_than_the_run_rises_to_the_end_and_never_arrives(name: str) -> None:
    args = args_of(name, {"warmup": 10, "decay": 3, "end": 0.0})
    assert rates_of(build(name, args, total=4), 4) == pytest.approx([PEAK * n / 10 for n in (1, 2, 3, 4)], rel=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_the_run_equals_its_number_of_steps(name: str) -> None:
    share = args_of(name, {"warmup": 0.1, "decay": 0.25, "end": 0.1})
    steps = args_of(name, {"warmup": 4, "decay": 10, "end": 0.1})
    assert rates_of(build(name, share, total=40), 40) == rates_of(build(name, steps, total=40), 40)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10**6))
def test_a_share_is_the_nearest_number_of_steps_and_integers_are_themselves(share: float, total: int) -> None:
    # half a step, and the rounding of a product of up to a million
    assert abs(as_steps(share, total, "warmup") - share * total) <= 0.5 + 1e-9
    assert as_steps(total, 7, "warmup") == as_steps(float(total), 7, "warmup") == total


def test_each_group_keeps_its_own_peak() -> None:
    optimizer = make_optimizer(1.0, 0.1)
    schedule = build("linear", {"warmup": 2}, total=10, optimizer=optimizer)
    for step in range(10):
        factor = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 8
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor, factor / 10], rel=1e-14)
        optimizer.step()
        schedule.step()


def test_it_starts_at_the_first_factor_and_a_constant_stays() -> None:
    optimizer = make_optimizer()
    build("cosine", {"warmup": 5}, total=10, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == PEAK / 5
    assert rates_of(build("constant", {}, total=3), 6) == [PEAK] * 6


# ---------------------------------------------------------------------- resuming

TORCHS = [
    ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 0.7}),
    ("torch.optim.lr_scheduler.StepLR", {"step_size": 3, "gamma": 0.5}),
    ("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": 12, "eta_min": 0.01}),
    ("torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.9}),
    ("torch.optim.lr_scheduler.MultiStepLR", {"milestones": [3, 7]}),
]
OURS = [(name, args_of(name, {"warmup": 3, "decay": 4, "end": 0.1})) for name in NAMES]


def resumed(target: str, args: dict[str, Any], *, total: int, new_total: int, at: int) -> list[float]:
    """The rates from step `at` of a new schedule with a new optimizer, both loaded from a saved state."""
    before = build(target, args, total=total)
    rates_of(before, at)
    after = build(target, args, total=new_total)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.load_state_dict(before.state_dict())
    return rates_of(after, new_total - at)


@pytest.mark.parametrize(("target", "args"), OURS + TORCHS, ids=str)
def test_resuming_from_any_step_is_bit_equal_to_an_uninterrupted_run(target: str, args: dict[str, Any]) -> None:
    whole = rates_of(build(target, args, total=12), 12)
    for at in range(12):
        assert resumed(target, args, total=12, new_total=12, at=at) == whole[at:]


@pytest.mark.parametrize(("target", "args"), OURS, ids=str)
def test_resuming_with_a_larger_total_follows_the_longer_runs_form(target: str, args: dict[str, Any]) -> None:
    longer = rates_of(build(target, args, total=20), 20)
    for at in (2, 6, 11):
        # The rate of the first step was saved with the optimizer. The form applies from the next step.
        assert resumed(target, args, total=12, new_total=20, at=at)[1:] == longer[at + 1 :]


def test_a_state_is_plain_numbers() -> None:
    state = build("cosine", {"warmup": 2}, total=9).state_dict()
    assert state.pop("lr_lambdas") == [None]
    flat = [item for value in state.values() for item in (value if isinstance(value, list) else [value])]
    assert all(isinstance(item, int | float | bool) for item in flat)


# ---------------------------------------------------------------------- schedulers of torch and of users


@pytest.mark.parametrize(("target", "args"), TORCHS, ids=str)
def test_torchs_schedulers_equal_a_manual_loop(target: str, args: dict[str, Any]) -> None:
    plain = getattr(torch.optim.lr_scheduler, target.rsplit(".", 1)[1])
    length = {"total_steps": 12} if "OneCycle" in target else {}
    assert rates_of(build(target, args, total=12), 12) == rates_of(plain(make_optimizer(), **args, **length), 12)


@pytest.mark.parametrize(
    ("length", "steps"),
    [({}, 12), ({"total_steps": 30}, 30), ({"epochs": 4, "steps_per_epoch": 5}, 20)],
    ids=str,
)
def test_the_runs_length_is_offered_and_a_users_value_is_kept(length: dict[str, int], steps: int) -> None:
    schedule = build("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, **length}, total=12)
    assert schedule.total_steps == steps


def test_a_users_function_makes_a_schedule() -> None:
    def halved(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < total_steps / 2 else 0.5)

    schedule = schedule_factory(halved, {}, total_steps=4)(make_optimizer())
    assert rates_of(schedule, 4) == [PEAK, PEAK, PEAK / 2, PEAK / 2]


# ---------------------------------------------------------------------- rejected schedules


@pytest.mark.parametrize("amount", [-1, -0.1, 2.5, math.nan, math.inf, True, "10%", None, [1]], ids=repr)
@pytest.mark.parametrize(
    ("name", "key"), [("cosine", "warmup"), ("linear", "warmup"), ("warmup_stable_decay", "decay")]
)
def test_an_amount_that_is_neither_steps_nor_a_share_is_rejected(name: str, key: str, amount: Any) -> None:
    args = {"warmup": 0, key: amount} if key == "decay" else {key: amount}
    with pytest.raises(ConfigError) as error:
        build(name, args, total=10)
    assert str(error.value).startswith(f"Cannot use schedule.args.{key}.")
    assert f"problem: {amount!r} is neither a number of steps nor a share" in str(error.value)


@pytest.mark.parametrize("end", [-0.1, math.nan, math.inf, "0.1", True], ids=repr)
@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
def test_an_end_that_is_no_share_of_the_peak_is_rejected(name: str, end: Any) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.args\.end"):
        build(name, args_of(name, {"warmup": 1, "decay": 1, "end": end}), total=10)


@pytest.mark.parametrize(
    ("target", "args", "named"),
    [
        ("cosine", {"warmpu": 3}, "did you mean 'warmup'"),
        ("warmup_stable_decay", {"warmup": 3}, "missing a required argument: 'decay'"),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", {}, "missing a required argument: 'T_max'"),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {}, "ReduceLROnPlateau.step needs metrics"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_called_is_rejected_before_there_is_an_optimizer(
    target: str, args: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        schedule_factory(resolve_target(target, section="schedule", folder=None), args, total_steps=5)


@pytest.mark.parametrize(
    ("make", "args", "error", "named"),
    [
        (torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": 3}, ConfigError, r"not callable \(lr_lambda=3\)"),
        (torch.optim.lr_scheduler.OneCycleLR, {"max_lr": "x"}, ConfigError, "max_lr='x'"),
        (
            torch.optim.lr_scheduler.OneCycleLR,
            {"max_lr": 1.0, "total_steps": 4},
            ConfigError,
            "total_steps=4 in a run of 5",
        ),
        (lambda optimizer: 3, {}, ConfigError, "problem: it returns a int"),
        # a defect in the user's function is not wrapped
        (lambda optimizer: int("x"), {}, ValueError, "invalid literal"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_rejected(
    make: Callable[..., Any], args: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        schedule_factory(make, args, total_steps=5)(make_optimizer())
