"""A run's messages, status and process group match users' expectations, from Python and from the command line."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset
from world import run_world

import disttrain
from disttrain.cli.train import torchrun_command
from disttrain.errors import CheckpointError, ConfigError, LaunchError
from disttrain.report import RunFolder

ROOT = Path(__file__).parents[2]
QUIET = ["report.every=1", "report.progress=false", "report.plot=false", "checkpoint.at_end=false", "run.device=cpu"]


def squares(model: Any, batch: Any) -> Any:
    return ((model(batch[0]) - batch[1]) ** 2).sum(), len(batch[0])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def line() -> torch.nn.Module:
    return torch.nn.Linear(2, 1)


def points(count: int = 16) -> TensorDataset:
    return TensorDataset(torch.ones(count, 2), torch.ones(count, 1))


def engine_in(folder: Path, *overrides: str, logs: bool = True, **run: Any) -> disttrain.Engine:
    config = {"run": {"name": "run", "dir": str(folder), "steps": 4, **run}, "strategy": {"name": "ddp"}}
    return disttrain.Engine(config, [*QUIET, *overrides], logs=logs)


def train_steps(engine: disttrain.Engine, **values: Any) -> None:
    with engine:
        engine.prepare("model", line, sgd)
        for step in engine.batches(points(), global_batch=4):
            engine.accumulate("model", step, squares)
            engine.step("model")
            engine.log(**values)
            if engine.should_stop():
                break


def status_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


# ---------------------------------------------------------------------- messages from Python


def complete_config(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "run": {"name": "run", "dir": str(folder), "steps": 2, "device": "cpu"},
        "model": {"target": line},
        "objective": {"target": lambda model, batch: squares(model, batch)},
        "data": {"train": {"target": points}, "global_batch": 4},
        "optim": {"target": "torch.optim.SGD", "args": {"lr": 0.1}},
        "strategy": {"name": "none"},
        "report": {"every": 1, "progress": False, "plot": False},
        **more,
    }


def test_train_reports_start_end_and_a_run_that_had_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert disttrain.train(complete_config(tmp_path)).state == "finished"
    first = capsys.readouterr().err
    assert f"[report] {tmp_path}/run: from step 0" in first
    assert f"[report] {tmp_path}/run: finished at step 2\n" in first
    again = disttrain.train(complete_config(tmp_path), {"optim.args.lr": 0.5})
    second = capsys.readouterr().err
    assert (again.state, again.step) == ("finished", 2)
    assert f"{tmp_path}/run: finished at step 2 already; set a larger run.steps" in second
    assert "nothing was trained with the changed optim.args.lr: 0.1 there, 0.5 requested" in second
    disttrain.train(complete_config(tmp_path), {"run.steps": 3})
    assert f"continues at step 2 from {tmp_path}/run/checkpoints/step-00000002" in capsys.readouterr().err
    disttrain.train(complete_config(tmp_path), {"run.steps": 3}, logs=False)
    assert capsys.readouterr().err == ""


def test_a_loop_that_ends_early_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_in(tmp_path) as engine:
        engine.prepare("model", line, sgd)
        engine.accumulate("model", next(iter(engine.batches(points(), global_batch=4))), squares)
        engine.step("model")
        engine.log()
    assert "the loop ended before run.steps=4" in capsys.readouterr().err


@pytest.fixture
def application_log(tmp_path: Path) -> Iterator[Path]:
    """An application that writes the warnings of all libraries to a file."""
    file = tmp_path / "application.log"
    handler = logging.FileHandler(file)
    logging.getLogger().addHandler(handler)
    yield file
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_an_application_that_configured_logging_keeps_its_configuration(
    tmp_path: Path, application_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its root logger passes only warnings, and its handler is the only one."""
    train_steps(engine_in(tmp_path / "first"))
    train_steps(engine_in(tmp_path / "first"))
    logging.getLogger("disttrain.report").warning("once")
    assert application_log.read_text() == "once\n"
    assert capsys.readouterr().err == ""
    logging.getLogger("disttrain").setLevel(logging.INFO)
    try:
        train_steps(engine_in(tmp_path / "second"))
    finally:
        logging.getLogger("disttrain").setLevel(logging.NOTSET)
    assert application_log.read_text().count("second/run: from step 0") == 1
    assert capsys.readouterr().err == ""


def test_repeated_engines_print_each_message_once_and_leave_the_logger_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        train_steps(engine_in(tmp_path / str(number)))
        assert capsys.readouterr().err.count(": from step 0, ") == 1
    assert [record.message.count(": from step 0, ") for record in caplog.records].count(1) == 3
    logger = logging.getLogger("disttrain")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)


def test_a_failed_start_leaves_the_logger_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        engine_in(tmp_path, "mesh.tensor=3")
    assert logging.getLogger("disttrain").handlers == []


# ---------------------------------------------------------------------- metrics and status


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("key", ["step", "loss", "lr", "mfu", "strategy", "critic/loss"])
def test_a_script_cannot_replace_built_in_keys_of_the_metrics(key: str, every: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"engine.log cannot write {key}"), engine_in(tmp_path) as engine:
        engine.prepare("model", line, sgd)
        engine.prepare("critic", line, sgd)
        for number, step in enumerate(engine.batches(points(), global_batch=4)):
            engine.accumulate("model", step, squares)
            engine.step("model")
            engine.log(**({key: 0.0} if number == 1 else {"my_loss": 2.5, "other/loss": 1.0}))
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [(one["step"], one["my_loss"], one["other/loss"]) for one in lines] == [(1, 2.5, 1.0)]
    assert status_in(tmp_path)["step"] == 1, "the rejected step is not counted"


def log_step_on_one_rank(folder: str) -> str:
    rank = int(os.environ["RANK"])
    try:
        train_steps(engine_in(Path(folder)), **({"step": 7} if rank == 1 else {}))
    except (ConfigError, CheckpointError, LaunchError, RuntimeError) as error:
        return type(error).__name__
    return "no error"


def test_built_in_keys_are_rejected_on_every_rank(tmp_path: Path) -> None:
    """Rank 1 writes no metrics, but rejects the key as well."""
    assert run_world(2, log_step_on_one_rank, str(tmp_path))[1] == "ConfigError"
    status = status_in(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert status["reason"].startswith("rank 1: ConfigError: engine.log cannot write step")


def test_the_status_has_the_step_of_each_report(tmp_path: Path) -> None:
    steps = []
    with engine_in(tmp_path) as engine:
        engine.prepare("model", line, sgd)
        for step in engine.batches(points(), global_batch=4):
            engine.accumulate("model", step, squares)
            engine.step("model")
            engine.log()
            steps.append((status_in(tmp_path)["state"], status_in(tmp_path)["step"]))
            if engine.should_stop():
                break
    assert steps == [("running", number) for number in (1, 2, 3, 4)]


def test_a_run_resumes_despite_an_empty_status(tmp_path: Path) -> None:
    """A power cut may leave an empty file."""
    train_steps(engine_in(tmp_path, "checkpoint.at_end=true"))
    (tmp_path / "run" / "status.json").write_text("")
    train_steps(engine_in(tmp_path, steps=6))
    assert status_in(tmp_path)["step"] == 6


def fail() -> Any:
    raise ValueError("no such thing")


def fail_in_prepare(engine: disttrain.Engine) -> None:
    engine.prepare("model", fail, sgd)


def fail_in_dataset(engine: disttrain.Engine) -> None:
    engine.prepare("model", line, sgd)
    engine.batches(fail())


def fail_in_resume(engine: disttrain.Engine) -> None:
    engine.prepare("model", line, sgd)
    engine.track("thing", object())
    engine.load("nowhere")


@pytest.mark.parametrize(
    ("act", "code", "reason"),
    [
        (fail_in_prepare, 1, "rank 0: ValueError: no such thing"),
        (fail_in_dataset, 1, "rank 0: ValueError: no such thing"),
        (fail_in_resume, 5, "rank 0: CheckpointError: Cannot load nowhere."),
    ],
)
def test_a_failure_before_the_first_batch_is_in_the_status(act: Any, code: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, CheckpointError)), engine_in(tmp_path) as engine:
        act(engine)
    status = status_in(tmp_path)
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 0, code)
    assert status["reason"].startswith(reason)
    train_steps(engine_in(tmp_path))
    assert status_in(tmp_path)["state"] == "finished"


def test_a_failure_before_the_first_batch_keeps_the_status_in_the_folder(tmp_path: Path) -> None:
    """The step of an unfinished run, and a finished run, which a third attempt must not train again."""
    train_steps(engine_in(tmp_path, "checkpoint.at_end=true", steps=3))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    (tmp_path / "run" / "status.json").write_text(json.dumps(status | {"state": "running"}))
    with pytest.raises(ValueError, match="no such thing"), engine_in(tmp_path) as engine:
        fail_in_prepare(engine)
    assert (status_in(tmp_path)["state"], status_in(tmp_path)["step"]) == ("failed", 3)
    train_steps(engine_in(tmp_path))
    with pytest.raises(ValueError, match="no such thing"), engine_in(tmp_path) as engine:
        fail_in_prepare(engine)
    assert (status_in(tmp_path)["state"], status_in(tmp_path)["step"]) == ("finished", 4)


SCRIPT = """
import sys
import torch
import disttrain
engine = disttrain.Engine({"run": {"name": "run", "dir": sys.argv[1], "steps": 2, "device": "cpu"}})
engine.prepare("model", lambda: torch.nn.Linear(2, "many"), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
"""


def test_a_script_without_a_with_block_writes_the_status_too(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "TypeError" in done.stderr, done.stderr
    status = status_in(tmp_path)
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 0, 1)
    assert status["reason"].startswith("rank 0: TypeError: ")


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_an_interrupted_run(presses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.resilience.interrupt.SAME_PRESS_S", 0.0)
    state = ""
    engine = engine_in(tmp_path)
    try:
        with engine:
            engine.prepare("model", line, sgd)
            for step in engine.batches(points(), global_batch=4):
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
                engine.accumulate("model", step, squares)
                engine.step("model")
                engine.log()
                if engine.should_stop():
                    break
            state = engine.finish()
    except KeyboardInterrupt:
        state = "KeyboardInterrupt"
    assert state == ("interrupted" if presses == 1 else "KeyboardInterrupt")
    status = status_in(tmp_path)
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    train_steps(engine_in(tmp_path))
    assert status_in(tmp_path)["state"] == "finished"


# ---------------------------------------------------------------------- process groups and commands


def test_engines_use_an_existing_process_group_and_leave_it_open(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for number in range(2):
            train_steps(engine_in(tmp_path / str(number)))
            assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_second_engine_does_not_share_the_group_of_an_open_one(tmp_path: Path) -> None:
    with engine_in(tmp_path / "open"):
        with pytest.raises(LaunchError, match="an earlier Engine still uses the process group"):
            engine_in(tmp_path / "second")
        assert dist.is_initialized()


def test_train_is_a_command_for_one_process(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(
        "import torch\n"
        "def points():\n    return torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1))\n"
        "def squares(model, batch):\n    return ((model(batch[0]) - batch[1]) ** 2).sum(), len(batch[0])\n"
    )
    (tmp_path / "config.yaml").write_text(
        "version: 1\n"
        "run: {name: run, dir: runs, steps: 2, device: cpu}\n"
        "model: {target: torch.nn.Linear, args: {in_features: 2, out_features: 1}}\n"
        "objective: {target: parts:squares}\n"
        "data: {train: {target: parts:points}, global_batch: 4}\n"
        "optim: {target: torch.optim.SGD, args: {lr: 0.1}}\n"
        "report: {plot: false}\n"
    )
    command = [sys.executable, "-m", "disttrain.cli", "train"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)

    done = run("config.yaml", "run.steps=3")
    assert done.returncode == 0 and "finished at step 3" in done.stderr, done.stderr
    assert status_in(tmp_path / "runs")["step"] == 3
    wrong = run("config.yaml", "data.train.target=parts:nothing", "run.name=other")
    assert wrong.returncode == 2 and "error (exit 2)" in wrong.stderr, wrong.stderr
    several = run("config.yaml", "strategy.name=fsdp", "mesh.tensor=2")
    assert several.returncode == 2
    line_to_type = torchrun_command("config.yaml", ["strategy.name=fsdp", "mesh.tensor=2"], 2)
    assert line_to_type.startswith("torchrun --standalone --nproc_per_node=2 -m disttrain.run config.yaml ")
    assert f"fix: start them with: {line_to_type}" in several.stderr
    printed = run("config.yaml", "strategy.name=fsdp", "--processes", "4")
    assert (printed.returncode, printed.stdout) == (
        0,
        torchrun_command("config.yaml", ["strategy.name=fsdp"], 4) + "\n",
    )


def test_a_master_port_of_zero_is_rejected_at_once(tmp_path: Path) -> None:
    """torchrun passes the 0 on, and its processes would wait for port 0 until run.timeout_s, half an hour."""
    (tmp_path / "script.py").write_text(
        f"import disttrain\ndisttrain.Engine({{'run': {{'dir': {str(tmp_path)!r}}}}})\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "LaunchError: The 2 processes of this world cannot connect." in done.stderr
    assert "problem: MASTER_PORT=0" in done.stderr
