"""Loading parts of a checkpoint: one model to evaluate or to continue with."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import disttrain
from disttrain.cli.evaluate import evaluate_run
from disttrain.errors import CheckpointError

QUIET = ["report.progress=false", "report.plot=false", "report.trackers=[]"]
PARTS = """\
import torch
from torch import nn


class Line(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.line, self.norm = nn.Linear(width, 1), nn.BatchNorm1d(1)

    def forward(self, x):
        return self.norm(self.line(x))


class Noisy(nn.Module):
    '''With a parameter of its own, and draws that depend on the step.'''

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, model, batch):
        noise = torch.randn(len(batch[1]), 1)
        return ((model(batch[0]) * self.scale + noise - batch[1]) ** 2).sum(), len(batch[1])


def points(count):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))
"""


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Path, dict[str, float]]]]:
    """Trains a config's model together with a frozen reference, with an optimizer and a schedule from Python."""
    (tmp_path / "loading_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    import loading_parts

    config: dict[str, Any] = {
        "run": {"name": "pair", "dir": str(tmp_path / "runs"), "steps": 5, "seed": 3},
        "strategy": {"name": "none"},
        "model": {"target": "loading_parts:Line"},
        "objective": {"target": "loading_parts:Noisy"},
        "data": {"train": {"target": "loading_parts:points", "args": {"count": 20}}, "global_batch": 5},
        "eval": {"sets": {"held_out": {"target": "loading_parts:points", "args": {"count": 13}}}},
    }

    def train(name: str = "model") -> tuple[Path, dict[str, float]]:
        objective = loading_parts.Noisy()
        with disttrain.Engine(config, QUIET) as engine:
            engine.prepare(
                name,
                loading_parts.Line,
                lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
                lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]),
                objective=objective,
            )
            engine.prepare("reference", loading_parts.Line)
            for batches in engine.batches():
                engine.accumulate(name, batches, objective)
                engine.step(name)
                engine.log()
                if engine.should_stop():
                    break
            return engine.folder, engine.evaluate(name=name, objective=objective)

    yield train
    sys.modules.pop("loading_parts", None)


def test_eval_reads_the_configs_model_and_objective_from_a_run_with_more(
    trained: Callable[..., tuple[Path, dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, found_there = trained()
    capsys.readouterr()
    evaluate_run(path=str(run), overrides=[], as_json=True)
    # The result equals the run's evaluation, to the bit: weights, batch statistics, scale, and the draws of its last
    # step.
    assert json.loads(capsys.readouterr().out) == {"step": 5, **found_there}


def test_eval_of_a_run_without_the_model_lists_its_models(
    trained: Callable[..., tuple[Path, dict[str, float]]],
) -> None:
    run, _ = trained("policy")
    with pytest.raises(CheckpointError, match="models were prepared as policy, reference"):
        evaluate_run(path=str(run), overrides=[], as_json=True)


def test_a_model_is_loaded_by_its_name(trained: Callable[..., tuple[Path, dict[str, float]]]) -> None:
    run, _ = trained("policy")
    with pytest.raises(CheckpointError) as refused:
        disttrain.load(run)
    assert "models were prepared as policy, reference" in str(refused.value)
    assert "disttrain.load(path, name='policy')" in str(refused.value)
    policy, reference = disttrain.load(run, name="policy"), disttrain.load(run, name="reference")
    assert not torch.equal(policy.line.weight, reference.line.weight)
    assert int(policy.norm.num_batches_tracked) == 5 and int(reference.norm.num_batches_tracked) == 0


def test_another_models_shapes_are_rejected_with_a_fix(
    trained: Callable[..., tuple[Path, dict[str, float]]],
) -> None:
    run, _ = trained()
    with pytest.raises(CheckpointError) as refused:
        disttrain.load(run, make_model=lambda: torch.nn.Linear(3, 1))
    assert "missing: bias, weight; unexpected: line.bias" in str(refused.value)
    assert "strict" not in str(refused.value)


def test_loading_does_not_change_the_callers_random_state(
    trained: Callable[..., tuple[Path, dict[str, float]]],
) -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    def seed() -> None:
        torch.manual_seed(8)
        np.random.seed(8)
        random.seed(8)

    run, _ = trained()
    seed()
    expected = draw()
    seed()
    disttrain.load(run)
    assert draw() == expected
