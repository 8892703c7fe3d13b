"""Every file in configs/ trains on two gloo processes under torchrun, and its loss falls to the expected value."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launched import PROJECT, column, launch, metrics, only_run, status, torchrun

CONFIGS = PROJECT / "configs"


@dataclass(frozen=True)
class Expectation:
    """The result that a run must reach. `overrides` shorten it. Without overrides it runs in full."""

    reaches: Callable[[Path], bool]
    overrides: tuple[str, ...] = ()


def last(run: Path, key: str) -> float:
    """A metric's last value."""
    values = column(run, key)
    return values[max(values)]


EXPECTED = {
    # 256 equally likely bytes cost 5.55 nats, and 3.15 at their frequencies in this text
    "quickstart.yaml": Expectation(
        lambda run: last(run, "loss") < 3.15,
        ("run.steps=20", "report.every=1", "eval.at_end=false"),
    ),
    # logistic regression reaches 0.964, this network written in plain torch 0.958 to 0.967
    "digits.yaml": Expectation(lambda run: last(run, "eval/held_out/accuracy") > 0.94),
    # targets have variance 10, noise of variance 0.01; a plain loop ends at 0.012 to 0.015
    "custom_net.yaml": Expectation(lambda run: last(run, "loss") < 0.05),
    # the mean alone gets 0.98, least squares and this network written in plain torch 0.45 to 0.49
    "regression.yaml": Expectation(lambda run: last(run, "eval/held_out/loss") < 0.6),
}


def test_every_config_has_its_expectation() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_config_passes_check(name: str, tmp_path: Path) -> None:
    done = launch(
        sys.executable, "-m", "disttrain.cli", "check", str(CONFIGS / name), "--json", timeout_s=240, cwd=tmp_path
    )
    assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.parametrize(
    "name",
    [
        # Other tests train the quick start and the digits too, and the regression is like the digits.
        name if name == "custom_net.yaml" else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(EXPECTED)
    ],
)
def test_config_trains_on_two_processes(name: str, tmp_path: Path) -> None:
    expected = EXPECTED[name]
    torchrun(2, CONFIGS / name, f"run.dir={tmp_path}", "report.progress=false", *expected.overrides)
    run = only_run(tmp_path)
    assert status(run)["state"] == "finished"
    losses = column(run, "loss")
    assert losses[max(losses)] < losses[min(losses)]
    assert {line["world_size"] for line in metrics(run) if "loss" in line} == {2}
    assert expected.reaches(run), metrics(run)[-3:]
