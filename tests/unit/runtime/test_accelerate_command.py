"""How many processes accelerate was asked for: from its own command line, never from the script's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.runtime.accelerate_command import launch_options


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("python -m disttrain.run c.yaml", None),
        ("python -m torch.distributed.run --nproc_per_node=2 -m accelerate_things", None),
        ("python /bin/accelerate config", None),
        ("python /bin/accelerate launch -m disttrain.run --num_processes 4", {}),
        ("python /bin/accelerate-launch --num_processes 2 train.py --config_file x", {"num_processes": "2"}),
        ("python /bin/accelerate launch --num-processes=2 -m x", {"num_processes": "2"}),
        (
            "python -m accelerate.commands.launch --cpu --config_file a.yaml --num_machines 2 -m x",
            {"cpu": "", "config_file": "a.yaml", "num_machines": "2"},
        ),
    ],
)
def test_the_options_of_a_launch(line: str, options: dict[str, str] | None) -> None:
    assert launch_options(line.split()) == options


# A stand-in for accelerate's launcher, with its name in the command line, as the parent of the processes it starts.
PARENT = """
import subprocess, sys
code = "import os; from disttrain.runtime.accelerate_command import asked_processes; print(asked_processes(os.environ))"
subprocess.run([sys.executable, "-c", code], check=True)
"""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="a command line is read from /proc, on Linux")
@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (["--num_processes", "3"], "3"),
        (["--config_file", "given.yaml"], "5"),
        ([], "7"),
        (["--config_file", "nowhere.yaml"], "None"),
        (["--num_processes", "many"], "None"),
    ],
)
def test_the_launcher_in_the_process_tree_is_read(given: list[str], asked: str, tmp_path: Path) -> None:
    (tmp_path / "accelerate-launch").write_text(PARENT, encoding="utf-8")
    (tmp_path / "given.yaml").write_text("num_processes: 5\n", encoding="utf-8")
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("num_processes: 7\n", encoding="utf-8")
    command = [sys.executable, "accelerate-launch", *given, "train.py"]
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.strip() == asked
