"""The real `accelerate launch`: each of our files trains one world, by its strategy, with a world of one's numbers.

What a file means is tested in `tests/unit/config/foreign/test_accelerate_translation.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import PROJECT, column, launch, metrics, only_run, plain, user_environment

ACCELERATE = PROJECT / "configs" / "accelerate"
STEPS = (
    *("run.steps=5", "report.every=1", "report.progress=false", "report.plot=false", "report.trackers=[]"),
    *("eval.at_end=false", "data.micro_batch=4"),
    *("model.args.layers=2", "model.args.width=32", "model.args.heads=2", "model.args.context=32"),
)
QUICKSTART = ("-m", "disttrain.run", "configs/quickstart.yaml", *STEPS)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install disttrain[accelerate]",
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install disttrain[deepspeed]",
)


def accelerate_launch(file: Path, *more: str, port: int = 0) -> tuple[str, ...]:
    """The command line of `accelerate launch`; port 0 is a free one."""
    started = (sys.executable, "-m", "accelerate.commands.launch", f"--main_process_port={port}")
    return (*started, f"--config_file={file}", *more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    plain("configs/quickstart.yaml", *STEPS, f"run.dir={folder}")
    return only_run(folder)


def assert_one_world(run: Path, alone: Path, strategy: str) -> None:
    """Two ranks train together: the losses equal those of one process, under the strategy that the run reports."""
    lines = metrics(run)
    assert {line["world_size"] for line in lines} == {2}
    assert {line["strategy"] for line in lines} == {strategy}
    for key in ("loss", "grad_norm"):
        expected = column(alone, key)
        assert sorted(expected) == list(range(1, 6))
        # 2e-5: the order of float32 sums differs over 20 steps of AdamW
        assert column(run, key) == pytest.approx(expected, rel=2e-5)


CASES: list[Any] = [
    pytest.param("ddp", "accelerate", {"name": "ddp"}, marks=pytest.mark.slow),
    pytest.param("fsdp", "accelerate", {"name": "fsdp"}, marks=pytest.mark.slow),  # two machines below are FSDP, too
    pytest.param("zero2", "accelerate", {"name": "deepspeed", "stage": 2}, marks=(needs_deepspeed, pytest.mark.slow)),
    pytest.param("zero3", "accelerate", {"name": "deepspeed", "stage": 3}, marks=(needs_deepspeed, pytest.mark.slow)),
    ("fsdp", "ddp", {"name": "ddp"}),  # the README's command: accelerate only starts the processes
]


@pytest.mark.parametrize(("file", "named", "expected"), CASES, ids=["ddp", "fsdp", "zero2", "zero3", "fsdp-named-ddp"])
def test_the_quick_start_is_one_world(
    file: str, named: str, expected: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    command = accelerate_launch(ACCELERATE / f"{file}.yaml")
    done = launch(*command, *QUICKSTART, f"strategy.name={named}", f"run.dir={tmp_path}", timeout_s=300)
    run = only_run(tmp_path)
    assert_one_world(run, alone, expected["name"])
    saved = (run / "config.yaml").read_text(encoding="utf-8")
    strategy = yaml.safe_load(saved)["strategy"]
    assert {"name": strategy["name"], "stage": strategy["deepspeed"]["stage"]} == {"stage": 2, **expected}
    assert ("  # accelerate: distributed_type" in saved) == (named == "accelerate")
    assert ("accelerate launch asks for fsdp (FSDP), the config for ddp" in done.stderr) == (named == "ddp")


def test_two_machines_are_one_world(alone: Path, tmp_path: Path, free_port: int) -> None:
    file = ACCELERATE / "multi_node.yaml"
    machines = [
        subprocess.Popen(
            [
                *accelerate_launch(file, f"--machine_rank={rank}", port=free_port),
                *(*QUICKSTART, "strategy.name=accelerate", f"run.dir={tmp_path}"),
            ],
            cwd=PROJECT,
            env=user_environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [machine.communicate(timeout=300)[1] for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert_one_world(only_run(tmp_path), alone, "fsdp")


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago. Two launchers must get the same one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def changed(folder: Path, file: str, **values: Any) -> Path:
    """A copy of one of the project's files with other values."""
    path = folder / f"{file}.yaml"
    text = yaml.safe_load((ACCELERATE / f"{file}.yaml").read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**text, **values}), encoding="utf-8")
    return path


def test_a_world_of_unknown_size_is_rejected(tmp_path: Path) -> None:
    file = changed(tmp_path, "ddp", distributed_type="MULTI_CPU")
    done = launch(
        *accelerate_launch(file), *QUICKSTART, "strategy.name=ddp", f"run.dir={tmp_path}", timeout_s=240, expect=None
    )
    assert done.returncode != 0
    assert "error (exit 3): accelerate launch started fewer processes than it was asked for." in done.stderr
    assert not (tmp_path / "quickstart").exists()


def test_unsupported_settings_are_rejected_before_anything_starts(tmp_path: Path) -> None:
    file = changed(tmp_path, "fsdp", fsdp_config={"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, mixed_precision="bf16")
    done = launch(
        *accelerate_launch(file),
        *(*QUICKSTART, "strategy.name=accelerate", f"run.dir={tmp_path}"),
        timeout_s=240,
        expect=None,
    )
    assert done.returncode != 0
    assert done.stderr.count("error (exit 2): 3 problems in the config") == 1
    for said in ("fsdp_version (FSDP_VERSION)", "(FSDP_AUTO_WRAP_POLICY)", "(ACCELERATE_MIXED_PRECISION)"):
        assert said in done.stderr
    assert not (tmp_path / "quickstart").exists()


def test_several_processes_that_each_report_a_world_of_one_are_rejected(tmp_path: Path) -> None:
    environment = user_environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1")
    done = launch(
        *(sys.executable, *QUICKSTART, f"run.dir={tmp_path}"), timeout_s=240, environment=environment, expect=3
    )
    assert "2 processes that were started together (OMPI_COMM_WORLD_SIZE=2)" in done.stderr


def test_the_strategy_name_alone_needs_accelerate_launch(tmp_path: Path) -> None:
    command = (sys.executable, *QUICKSTART, "strategy.name=accelerate", f"run.dir={tmp_path}")
    done = launch(*command, timeout_s=240, expect=3)
    assert "problem: this process was started by plain python" in done.stderr


DOCS = (PROJECT / "docs" / "reference" / "accelerate.md").read_text(encoding="utf-8")


def test_every_command_of_the_docs_is_run() -> None:
    """`disttrain check` runs here. The launches run above, with the same files."""
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    checks = [line for line in lines if line.startswith("disttrain check")]
    assert checks
    for line in checks:
        launch(*shlex.split(line.split("  #")[0]), timeout_s=240)
    for line in (one for one in lines if one not in checks):
        words = shlex.split(line.split("  #")[0])
        assert words[:2] == ["accelerate", "launch"]
        file = words[words.index("--config_file") + 1]
        assert Path(file).stem in {"ddp", "fsdp", "zero2", "zero3", "multi_node"} and (PROJECT / file).exists()
        assert words[words.index("-m") :][:3] == ["-m", "disttrain.run", "configs/quickstart.yaml"]


def test_every_file_names_its_start_command() -> None:
    for file in ACCELERATE.iterdir():
        assert f"accelerate launch --config_file configs/accelerate/{file.name} " in file.read_text(encoding="utf-8")
