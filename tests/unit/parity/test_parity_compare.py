"""Comparing and explaining runs, on recordings and facts made up here with known results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain.cli.parity import render_report
from disttrain.config import load_config
from disttrain.errors import ConfigError
from disttrain.parity import causes
from disttrain.parity.causes import Cause
from disttrain.parity.compare import Bounds, Rounding, bounds_for, compare_runs, relative
from disttrain.parity.recorded import Recorded, Recorder
from disttrain.parity.report import Report, Row
from disttrain.parity.variants import Asked, Variant, plan_variants, uneven_micro_batch
from disttrain.parity.worlds import Failed

BOUNDS = Bounds(1e-5, 1e-5, 1e-4)


def record(
    folder: Path, weights: Sequence[dict[str, Tensor]], losses: Sequence[float], norms: Sequence[float] | None = None
) -> Recorded:
    """A run with these weights before the first and after each step."""
    recorder = Recorder(folder)
    for step, tensors in enumerate(weights):
        recorder.weights(step, tensors)
    recorder.finish(losses, norms or [1.0] * len(losses))
    return Recorded.read(folder)


def moved(steps: int, start: int, by: float) -> list[dict[str, Tensor]]:
    """Two tensors of norm 2. The second differs by `by` relative from step `start`."""
    a, b = torch.ones(4), torch.ones(2, 2)
    off = torch.tensor([[2.0 * by, 0.0], [0.0, 0.0]])
    return [{"a": a, "b": b + off if step >= start else b} for step in range(steps + 1)]


def test_equal_runs_are_equal(tmp_path: Path) -> None:
    ours, theirs = (record(tmp_path / name, moved(3, 9, 0.0), [3.0, 2.0, 1.0]) for name in "xy")
    found = compare_runs(ours, theirs, BOUNDS)
    assert found.equal
    assert (found.loss, found.norm, found.parameters, found.tensors) == (0.0, 0.0, 0.0, ())


@pytest.mark.parametrize(("by", "equal"), [(5e-5, True), (2e-4, False)])
def test_a_parameter_is_named_with_its_step_and_size(by: float, equal: bool, tmp_path: Path) -> None:
    theirs = record(tmp_path / "y", moved(3, 9, 0.0), [3.0, 2.0, 1.0])
    found = compare_runs(record(tmp_path / "x", moved(3, 2, by), [3.0, 2.0, 1.0]), theirs, BOUNDS)
    assert found.equal is equal
    assert found.parameters == pytest.approx(by, rel=1e-3)
    if not equal:
        assert (found.first_step, found.first_in) == (2, "parameters")
        assert [(one.name, one.step) for one in found.tensors] == [("b", 2)]


def test_the_earliest_difference_is_the_one_named(tmp_path: Path) -> None:
    theirs = record(tmp_path / "y", moved(3, 9, 0.0), [3.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    ours = record(tmp_path / "x", moved(3, 2, 1.0), [3.0, 2.0, 1.1], [1.0001, 1.0, 1.0])
    found = compare_runs(ours, theirs, BOUNDS)
    assert (found.first_step, found.first_in) == (1, "gradient norm")
    assert found.loss == pytest.approx(0.1)


def test_initial_weights_must_be_bit_equal(tmp_path: Path) -> None:
    theirs = record(tmp_path / "y", moved(1, 9, 0.0), [1.0])
    found = compare_runs(record(tmp_path / "x", moved(1, 0, 1e-6), [1.0]), theirs, BOUNDS)
    assert (found.equal, found.first_step) == (False, 0)


def test_other_names_and_fewer_steps_are_differences(tmp_path: Path) -> None:
    theirs = record(tmp_path / "y", moved(2, 9, 0.0), [1.0, 1.0])
    short = compare_runs(record(tmp_path / "x", moved(1, 9, 0.0), [1.0]), theirs, BOUNDS)
    assert (short.equal, short.first_in) == (False, "number of steps")
    renamed = [{"a": one["a"], "c": one["b"]} for one in moved(2, 9, 0.0)]
    other = compare_runs(record(tmp_path / "z", renamed, [1.0, 1.0]), theirs, BOUNDS)
    assert (other.equal, other.missing) == (False, ("b", "c"))


def test_entries_without_a_gradient_are_undetermined_and_others_are_not(tmp_path: Path) -> None:
    theirs = record(tmp_path / "y", moved(2, 9, 0.0), [1.0, 1.0])
    ours = record(tmp_path / "x", moved(2, 1, 0.5), [1.0, 1.0])  # entry (0, 0) of b alone
    strong, noise = torch.full((2, 2), 1e-3), torch.tensor([[1e-9, 0.0], [0.0, 0.0]])
    for folder, gradient in (("own", strong * (noise == 0) + noise), ("wide", strong * (noise == 0))):
        recorder = Recorder(tmp_path / folder)
        for step in (1, 2):
            recorder.gradients(step, {"a": torch.ones(4), "b": gradient})
        recorder.finish([1.0, 1.0], [1.0, 1.0])
    rounding = Rounding(Recorded.read(tmp_path / "own"), Recorded.read(tmp_path / "wide"))
    assert not compare_runs(ours, theirs, BOUNDS).equal
    found = compare_runs(ours, theirs, BOUNDS, rounding)
    assert found.equal
    assert [(one.name, one.undetermined, one.entries) for one in found.undetermined] == [("b", 1, 4)]
    # Another entry of the same tensor, which has a gradient, is not excused.
    elsewhere = [{**one, "b": one["b"] + torch.tensor([[0.0, 0.0], [0.1, 0.0]])} for one in moved(2, 1, 0.5)]
    elsewhere[0] = moved(2, 1, 0.5)[0]
    assert not compare_runs(record(tmp_path / "z", elsewhere, [1.0, 1.0]), theirs, BOUNDS, rounding).equal


def test_numbers_that_are_not_finite_differ_from_those_that_are() -> None:
    assert relative(math.nan, 1.0) == math.inf
    assert relative(math.inf, math.inf) == relative(math.nan, math.nan) == 0.0


def test_bounds_follow_the_narrowest_dtype() -> None:
    assert bounds_for("fp32", "fp32") == BOUNDS
    assert bounds_for("fp64", "fp64") == Bounds(1e-9, 1e-9, 1e-9)
    assert bounds_for("bf16", "fp32").loss == bounds_for("bf16", "bf16").loss == 2.0**-8
    assert bounds_for("fp16", "fp32").norm == 4 * 2.0**-11


# ---------------------------------------------------------------------- causes


def probe(**more: Any) -> dict[str, Any]:
    return {
        "draws": False,
        "batch_norms": [],
        "changing_buffers": [],
        "couples_items": False,
        "elementwise": True,
        "stream": False,
        "objective": None,
        **more,
    }


def adding(total: float, weight: float, totals: Sequence[float], weights: Sequence[float]) -> dict[str, Any]:
    parts = {"part_totals": [[one] for one in totals], "part_weights": [[one] for one in weights]}
    return {"samples": [3, 1], "total": [total], "weight": [weight], **parts}


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (adding(8.0, 4, [6.0, 2.0], [3, 1]), None),  # a sum over its items
        (adding(2.0, 1, [1.9, 2.3], [1, 1]), causes.OBJECTIVE),  # a mean that weighs one
        (adding(2.0, 4, [1.9, 2.3], [3, 1]), causes.OBJECTIVE),  # a mean that weighs its items
        # more than the sum of its parts: items depend on one another
        (adding(9.0, 4, [5.0, 0.0], [3, 1]), causes.COUPLED),
    ],
)
def test_an_objective_is_judged_by_its_parts(found: dict[str, Any], cause: str | None) -> None:
    judged = causes.objective_cause(probe(objective=found))
    assert (judged and judged.cause) == cause


def config(*overrides: str) -> Any:
    parts = {
        "run": {"steps": 9},
        "model": {"target": "torch.nn:Identity"},
        "data": {"train": {"target": "byte_text"}, "global_batch": 32, "micro_batch": 16},
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.1}, "clip_norm": 0.5},
    }
    return load_config(parts, list(overrides))


def trials(*overrides: str, **facts: Any) -> list[tuple[str, tuple[str, ...], bool]]:
    found = causes.case_trials(overrides, config(), config(*overrides), probe(**facts))
    return [(one.cause, one.overrides, one.alone) for one in found]


def test_a_setting_of_the_case_is_suspected_first() -> None:
    own = ("strategy.name=ddp", "optim.clip_norm=2", "precision.compute=bf16", "data.micro_batch=4")
    assert [one[:2] for one in trials(*own)[:3]] == [
        (causes.CLIP, ("optim.clip_norm=2",)),
        (causes.DTYPE, ("precision.compute=bf16",)),
        (causes.SETTING, ("optim.clip_norm=2", "precision.compute=bf16")),
    ]


def test_an_optimizer_is_compared_with_sgd_only_if_it_is_not_elementwise() -> None:
    swap = (causes.OPTIMIZER, ("optim.target=torch.optim.SGD", "optim.args.lr=0.1"), False)
    assert swap in trials("strategy.name=fsdp", elementwise=False)
    assert swap not in trials("strategy.name=fsdp")


def test_micro_batches_are_tried_for_the_features_of_the_model() -> None:
    quiet = [one.evaluated for one in causes.micro_batch_trials(probe(draws=True, batch_norms=["n"]))]
    assert quiet == [("dropout",), ("batch_norm",), ("dropout", "batch_norm")]
    assert [one.evaluated for one in causes.micro_batch_trials(probe())] == [("everything",)]


# ---------------------------------------------------------------------- cases


@pytest.mark.parametrize(("whole", "micro"), [(32, 16), (32, 32), (16, 4), (7, 7), (2, 2), (3, 1), (64, 1)])
def test_the_other_micro_batch_leaves_an_uneven_last_one_where_possible(whole: int, micro: int) -> None:
    found = uneven_micro_batch(whole, micro)
    assert found is not None
    assert 1 <= found <= whole
    assert found != micro
    assert whole % found or whole <= 3


def test_the_last_micro_batch_is_no_single_sample_if_two_more_help() -> None:
    assert uneven_micro_batch(16, 4) == 6
    assert uneven_micro_batch(32, 16) == 11


def test_one_sample_has_no_other_micro_batch() -> None:
    assert uneven_micro_batch(1, 1) is None


def planned(asked: Asked) -> list[Variant]:
    return plan_variants(lambda more: config("strategy.name=fsdp", *more), asked, global_batch=32, micro_batch=16)


def test_the_default_set_is_every_strategy_in_each_world_of_several() -> None:
    found = [(case.name, case.world_size, case.micro_batch) for case in planned(Asked())]
    assert found[:2] == [("none", 1, 16), ("fsdp", 1, 16)]
    assert {("ddp", 2, 16), ("fsdp", 2, 16), ("fsdp", 2, 11)} <= set(found)


def test_custom_cases_run_in_the_worlds_that_their_mesh_fits() -> None:
    found = planned(Asked(cases=("strategy.name=fsdp mesh.replicate=2",), world_sizes=(1, 2, 4)))
    assert [case.world_size for case in found] == [2, 4]
    assert found[0].overrides == ("strategy.name=fsdp", "mesh.replicate=2")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Asked(cases=("strategy.name=fsdp mesh.replicate=3",)), "its mesh fits none of these world sizes"),
        (Asked(cases=("strategy.nam=fsdp",)), "did you mean"),
        (Asked(strategies=("fsdp:2",)), "'fsdp' has no stages"),
        (Asked(strategies=("deepspeed:0",)), "use strategy.name=ddp"),
    ],
)
def test_bad_requests_are_rejected(asked: Asked, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        planned(asked)


# ---------------------------------------------------------------------- reports


def report(*rows: Row, reference: Recorded) -> Report:
    return Report(rows, 1, BOUNDS, 4, 8, reference, True, {}, None)


def test_exit_code_and_words(tmp_path: Path) -> None:
    same = record(tmp_path / "y", moved(1, 9, 0.0), [1.0])
    far = record(tmp_path / "x", moved(1, 1, 0.5), [1.0])
    equal = Row("ddp", 2, 4, ("strategy.name=ddp",), "equal", compare_runs(same, same, BOUNDS))
    why = Cause(causes.CLIP, "it clips at 1.0", "equal to a reference that clips at 1.0")
    off = replace(equal, name="fsdp", verdict="differs", difference=compare_runs(far, same, BOUNDS), causes=(why,))
    hung = Row("deepspeed:2", 2, 4, ("strategy.name=deepspeed",), "failed", error=Failed(7, "no end of it"))
    no = replace(hung, verdict="rejected", error=Failed(2, "not elementwise"))
    assert report(equal, reference=same).exit_code == 0
    assert report(equal, no, reference=same).exit_code == 0  # a rejected variant has not trained on other numbers
    assert report(no, reference=same).exit_code == 2
    assert report(equal, hung, reference=same).exit_code == 7
    assert report(equal, off, hung, reference=same).exit_code == 6
    assert render_report(report(equal, reference=same)).endswith("All 1 equal.")
    text = render_report(report(equal, off, no, reference=same))
    for said in ("b by 5.0e-01 (from step 1)", "cause: clip: it clips at 1.0", "exit code 2: not elementwise"):
        assert said in text
    assert text.endswith("1 equal, 1 differs, 1 rejected.")
