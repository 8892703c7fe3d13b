"""Mistakes in custom loops raise clear errors, and the engine keeps its duties: one rule per test."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from contract.engine_runs import QUIET
from contract.test_user_models import user_module
from torch import nn
from torch.utils.data import TensorDataset
from world import run_world

import disttrain
from disttrain.errors import CheckpointError, ConfigError, TrainingError
from disttrain.report import RunFolder
from disttrain.run import main

ROOT = Path(__file__).parents[2]


def engine_in(folder: Path, *overrides: str, **run: Any) -> disttrain.Engine:
    config = {"run": {"name": "rules", "dir": str(folder), "seed": 5, **run}, "strategy": {"name": "ddp"}}
    return disttrain.Engine(config, [*QUIET, *overrides])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def prepared_in(folder: Path, *overrides: str, **run: Any) -> tuple[disttrain.Engine, Any, Any]:
    """An engine with one prepared model, the batches of a small dataset, and the objective."""
    user = user_module()
    engine = engine_in(folder, *overrides, **run)
    engine.prepare("model", user.Slope, sgd)
    return engine, engine.batches(user.Augmented(20), global_batch=5), user.squares


class Biased(nn.Module):
    """An objective with a trainable parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, model: Any, batch: Any) -> Any:
        return ((model(batch[0]) + self.bias - batch[1]) ** 2).sum(), len(batch[0])


def test_an_untrained_objective_is_rejected(tmp_path: Path) -> None:
    engine, batches, _ = prepared_in(tmp_path, steps=2)
    with engine, pytest.raises(ConfigError, match="pass it to prepare"):
        engine.accumulate("model", next(batches), Biased())


@pytest.mark.parametrize("wrong", [[], ["text"], [(torch.ones(2, 3), torch.ones(2, 1))]])
def test_an_argument_that_is_no_list_of_micro_batches_is_rejected(wrong: list[Any], tmp_path: Path) -> None:
    engine, _, objective = prepared_in(tmp_path, steps=2)
    with engine, pytest.raises(ConfigError, match=r"engine\.micro_batches"):
        engine.accumulate("model", wrong, objective)


def test_a_loop_that_forgets_to_log_gets_an_error(tmp_path: Path) -> None:
    engine, batches, objective = prepared_in(tmp_path, steps=4)
    with engine, pytest.raises(ConfigError, match=r"without engine\.log"):
        for step in batches:
            engine.accumulate("model", step, objective)
            engine.step("model")


@pytest.mark.parametrize("background", ["false", "true"])
def test_nothing_is_saved_between_a_step_and_its_log(background: str, tmp_path: Path) -> None:
    """The weights belong to a step that is not counted yet."""
    background = f"checkpoint.background={background}"
    engine, batches, objective = prepared_in(tmp_path, "checkpoint.every=1", background, steps=4)
    with engine:
        for number in range(2):
            engine.accumulate("model", next(batches), objective)
            engine.step("model")
            for act in (engine.save, engine.should_stop) if number else ():
                with pytest.raises(ConfigError, match=r"without engine\.log"):
                    act()
            engine.log()
        assert not list(tmp_path.rglob("step-*"))
        engine.should_stop()
    assert [path.name for path in tmp_path.rglob("step-*")] == ["step-00000002"]


def test_a_frozen_model_is_not_accumulated_into(tmp_path: Path) -> None:
    user = user_module()
    with engine_in(tmp_path, steps=2) as engine:
        engine.prepare("teacher", user.Slope)
        with pytest.raises(ConfigError, match="frozen"):
            engine.accumulate("teacher", engine.micro_batches([(torch.ones(2, 3), torch.ones(2, 1))]), user.squares)


def test_nothing_is_loaded_into_a_loop_that_has_started(tmp_path: Path) -> None:
    engine, batches, _ = prepared_in(tmp_path, steps=2)
    with engine:
        next(batches)
        with pytest.raises(ConfigError, match="before the first batch"):
            engine.load(tmp_path)


@pytest.mark.parametrize(("length", "steps"), [({"epochs": 3}, 12), ({"steps": 7}, 7)])
def test_the_configs_length_ends_a_custom_loop(length: dict[str, int], steps: int, tmp_path: Path) -> None:
    engine, batches, objective = prepared_in(tmp_path, **length)  # 20 samples in steps of 5
    with engine:
        for step in batches:
            engine.accumulate("model", step, objective)
            engine.step("model")
            engine.log()
            assert engine.progress.steps <= steps
            if engine.should_stop():
                break
        assert engine.progress.steps == steps


def test_settings_that_a_script_omits_come_from_the_config(tmp_path: Path) -> None:
    user = user_module()
    data = ["data.global_batch=10", "data.micro_batch=2", "data.train.target=builtins:list", "run.epochs=3"]
    with engine_in(tmp_path, *data) as engine:
        engine.prepare("model", user.Slope, sgd)
        others = engine.batches(user.Augmented(9), name="others", global_batch=3)
        step = next(engine.batches(user.Augmented(20), global_batch=8))
        assert [micro.samples for micro in step] == [2, 2, 2, 2]
        assert [micro.samples for micro in next(others)] == [2, 1]
        assert engine.total_steps == 9, "20 samples in steps of 8, three times: the other data say nothing of it"


def walk_without_data(folder: Path, stop_at: int) -> list[float]:
    """Like PPO: the loop makes its training data, with generators that the script draws from."""
    user = user_module()
    with engine_in(folder, "checkpoint.every=2", steps=6) as engine:
        engine.prepare("model", user.Slope, sgd)
        engine.resume()
        losses = []
        while not engine.should_stop():
            inputs = torch.randn(4, 3, generator=engine.generator("rollout"))
            step = engine.micro_batches([(inputs[:2], inputs[:2, :1]), (inputs[2:], inputs[2:, :1])])
            losses.append(engine.accumulate("model", step, user.squares).loss)
            engine.step("model")
            engine.log()
            if engine.progress.steps == stop_at:
                engine.save()
                break
        return losses


def test_a_loop_without_a_dataset_resumes_too(tmp_path: Path) -> None:
    whole = walk_without_data(tmp_path / "whole", 6)
    cut = [*walk_without_data(tmp_path / "cut", 3), *walk_without_data(tmp_path / "cut", 6)]
    assert cut == whole
    assert len(whole) == 6


def draw_in_loop(folder: Path, stop_at: int) -> list[float]:
    """A script that draws from every generator between its steps."""
    engine, batches, objective = prepared_in(folder, steps=6)
    drawn = []
    with engine:
        for step in batches:
            drawn.append(float(torch.rand(())) + float(np.random.rand()) + random.random())
            engine.accumulate("model", step, objective)
            engine.step("model")
            engine.log()
            if engine.should_stop() or engine.progress.steps == stop_at:
                engine.save()
                break
    return drawn


def test_random_numbers_drawn_in_a_loop_continue_after_a_resume(tmp_path: Path) -> None:
    whole = draw_in_loop(tmp_path / "whole", 6)
    assert [*draw_in_loop(tmp_path / "cut", 2), *draw_in_loop(tmp_path / "cut", 6)] == whole
    assert len(set(whole)) == 6


def test_reported_numbers_are_those_of_the_objective_that_was_used(tmp_path: Path) -> None:
    engine, batches, _ = prepared_in(tmp_path, "objective.target=cross_entropy", steps=1)
    with engine:
        objective = lambda model, batch: (model(batch[0]).square().sum(), len(batch[0]), {"mine": torch.ones(())})  # noqa: E731
        engine.accumulate("model", next(batches), objective)
        engine.step("model")
        engine.log()
    line = json.loads((tmp_path / "rules" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["mine"] == pytest.approx(1 / 5)


class Poison(nn.Module):
    """A finite loss whose gradient is not, at the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls = nn.Linear(3, 1), 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.line(x) + (torch.sqrt(self.line.weight.sum() * 0.0) if self.calls == 2 else 0.0)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    user = user_module()
    finite = pytest.raises(TrainingError, match=r"not finite|to be finite")
    with finite, engine_in(tmp_path, "report.every=9") as engine:
        engine.prepare("model", Poison, sgd)
        for step in engine.batches(user.Augmented(20), global_batch=5):
            engine.accumulate("model", step, user.squares)
            engine.step("model")
            engine.log()
            if engine.progress.steps == 2:
                engine.save()
    assert list((tmp_path / "rules").glob("checkpoints/step-*")) == []


class Poisoned(Biased):
    """Only the objective's parameter gets a gradient that is not finite."""

    def forward(self, model: Any, batch: Any) -> Any:
        total, weight = super().forward(model, batch)
        return total + torch.sqrt(self.bias.sum() * 0.0), weight


def test_a_trained_objective_is_checked_too(tmp_path: Path) -> None:
    user = user_module()
    finite = pytest.raises(TrainingError, match="objective/model/bias is not")
    with finite, engine_in(tmp_path, "report.every=9", steps=20) as engine:
        engine.prepare("model", user.Slope, sgd, objective=Poisoned())
        engine.resume()
        engine.progress.steps = 1  # a step without a report, where the norm is not checked
        step = engine.micro_batches([(torch.ones(2, 3), torch.ones(2, 1))])
        engine.accumulate("model", step)
        engine.step("model")
        engine.log()
        engine.save()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Any) -> Any:
        return self.net(x)


def points() -> TensorDataset:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x[:, :3].argmax(1))


def train_normed(folder: Path, strategy: str) -> dict[str, float]:
    config = {
        "run": {"name": "normed", "dir": str(folder), "steps": 6},
        "model": {"target": Normed},
        "objective": {"target": "cross_entropy"},
        "data": {"train": {"target": points}, "global_batch": 8, "micro_batch": 4},
        "eval": {"sets": {"held_out": {"target": points}}},
        "optim": {"target": "torch.optim.SGD", "args": {"lr": 0.1}},
        "strategy": {"name": strategy},
    }
    return dict(disttrain.train(config, QUIET).evaluation)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_an_evaluation_uses_the_checkpoints_batch_statistics_too(strategy: str, tmp_path: Path) -> None:
    told = run_world(2, train_normed, tmp_path, strategy)
    assert told[0] == told[1]
    model = disttrain.load(tmp_path / "normed", make_model=Normed)
    inputs, targets = points().tensors
    with torch.no_grad():
        expected = float(F.cross_entropy(model(inputs), targets))
    assert told[0]["eval/held_out/loss"] == pytest.approx(expected, rel=1e-5)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from contract.test_engine_rules import prepared_in
engine, batches, objective = prepared_in(Path({folder!r}), steps=3)
for step in batches:
    engine.accumulate("model", step, objective)
    engine.step("model")
    engine.log()
    if {fails}:
        raise ValueError("the script's own")
    if engine.should_stop():
        break
"""


@pytest.mark.parametrize(("fails", "state"), [(False, "finished"), (True, "failed")])
def test_a_script_without_a_with_block_ends_well_or_is_reported_as_failed(
    fails: bool, state: str, tmp_path: Path
) -> None:
    code = SCRIPT.format(tests=str(ROOT / "tests"), folder=str(tmp_path), fails=fails)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == int(fails), done.stderr
    status = json.loads((tmp_path / "rules" / "status.json").read_text())
    assert status["state"] == state
    assert (tmp_path / "rules" / "checkpoints" / "step-00000003").exists() is not fails


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    code = SCRIPT.format(tests=str(ROOT / "tests"), folder=str(tmp_path), fails=False)
    hold = code.replace("steps=3)", "steps=3); print('held', flush=True); sys.stdin.readline()")
    with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True, cwd=ROOT) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="one run at a time"):
            RunFolder(tmp_path / "rules").lock(wait_s=0.5)
        holder.stdin.write("\n")
        holder.stdin.close()
        folder = RunFolder(tmp_path / "rules")
        folder.lock(wait_s=60)  # waits for the run that is ending
        folder.unlock()
    assert holder.returncode == 0


def test_a_folder_that_cannot_be_written_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "configs")
    (tmp_path / "file").write_text("in the way")
    assert main(["digits.yaml", f"run.dir={tmp_path / 'file'}", "report.progress=false"]) == 5
    err = capfd.readouterr().err
    assert "error (exit 5)" in err and "set another run.dir" in err and "Traceback" not in err


ALONE = """
import os
if os.environ["RANK"] == "1":
    raise OSError("rank 1's disk is gone")
from torch import nn
class Net(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
"""


def test_a_fault_of_one_rank_before_the_group_exists_is_reported(tmp_path: Path) -> None:
    (tmp_path / "lonely.py").write_text(ALONE)
    model = "target: mlp, args: {inputs: 64, hidden: [128, 64], outputs: 10, dropout: 0.1}"
    text = (ROOT / "configs" / "digits.yaml").read_text()
    assert model in text
    (tmp_path / "lonely.yaml").write_text(text.replace(model, "target: 'lonely:Net'"))
    (tmp_path / "digits.py").write_text((ROOT / "configs" / "digits.py").read_text())
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "disttrain.run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*agent, "lonely.yaml"], capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1
    assert "rank 1's disk is gone" in done.stderr


class Igloo:
    def __call__(self, model: Any, batch: Any) -> Any:
        raise RuntimeError("cannot open /data/igloo.bin: Timed out waiting")


def test_a_users_error_is_not_taken_for_a_lost_process(tmp_path: Path) -> None:
    engine, batches, _ = prepared_in(tmp_path, steps=2)
    with pytest.raises(RuntimeError, match="igloo"), engine:
        engine.accumulate("model", next(batches), Igloo())
    status = json.loads((tmp_path / "rules" / "status.json").read_text())
    assert status["exit_code"] == 1 and "igloo" in status["reason"]
