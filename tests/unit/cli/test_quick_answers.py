"""`--help` and `check` are quick: no torch, no user code, less than half of the time to import torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SCRIPT = [str(Path(sys.executable).with_name("disttrain"))]
MODULE = [sys.executable, "-m", "disttrain.cli"]
ASKED = {
    "help": ["--help"],
    "check": ["check", str(CONFIGS / "quickstart.yaml")],
    "check --json": ["check", str(CONFIGS / "custom_net.yaml"), "--json"],
    "check a fault": ["check", str(CONFIGS / "digits.yaml"), "optim.args.lrr=3"],
}


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=env)


def imported(stderr: str) -> set[str]:
    """The modules in an import-time profile."""
    rows = [line.rsplit("|", 1) for line in stderr.splitlines() if line.startswith("import time:")]
    return {row[1].strip() for row in rows}


@pytest.mark.parametrize(("command", "asked"), [*((SCRIPT, asked) for asked in ASKED), (MODULE, "check")])
def test_torch_is_not_imported(command: list[str], asked: str, tmp_path: Path) -> None:
    done = run([*command, *ASKED[asked]], tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == (2 if asked == "check a fault" else 0), done.stderr[-2000:]
    found = imported(done.stderr)
    assert {"disttrain.cli", "typer"} <= found, "the profile shows what is imported"
    assert not [name for name in found if name.partition(".")[0] in ("torch", "numpy", "sklearn", "matplotlib")]


def least_cpu_s(command: list[str], cwd: Path, times: int = 3) -> float:
    """User and system seconds of the fastest of several runs. Other processes on the machine can only add time."""
    spent = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(command, cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(spent)


@pytest.mark.slow
def test_the_answer_takes_less_than_half_of_importing_torch(tmp_path: Path) -> None:
    torch = least_cpu_s([sys.executable, "-c", "import torch"], tmp_path)
    for asked in ("help", "check"):
        run([*SCRIPT, *ASKED[asked]], tmp_path)  # compiles what has not been compiled yet
        assert 0 < least_cpu_s([*SCRIPT, *ASKED[asked]], tmp_path) < torch / 2, asked


def test_importing_the_package_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, disttrain, disttrain.config; print(disttrain.Config.__name__, 'torch' in sys.modules)"
    assert run([sys.executable, "-c", code], tmp_path).stdout == "Config False\n"


def test_check_runs_no_user_code_and_import_does(tmp_path: Path) -> None:
    (tmp_path / "loud_parts.py").write_text(
        "import pathlib\nprint('loud')\npathlib.Path(__file__).with_name('ran').touch()\ndef make(a, b): ...\n"
    )
    (tmp_path / "c.yaml").write_text("model: {target: 'loud_parts:make', args: {a: 1, b: 2}}\n")
    quiet = run([*SCRIPT, "check", "c.yaml", "--json"], tmp_path)
    assert (quiet.returncode, (tmp_path / "ran").exists()) == (0, False)
    loud = run([*SCRIPT, "check", "c.yaml", "--json", "--import"], tmp_path)
    assert (loud.returncode, (tmp_path / "ran").exists()) == (0, True)
    assert json.loads(loud.stdout) == json.loads(quiet.stdout), "what a module prints is no result"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise ValueError('cannot be imported')", "raises ValueError: cannot be imported"),
        ("raise SystemExit(0)", "raises SystemExit: 0"),
        ("import disttrain_not_there", "raises ModuleNotFoundError: No module named 'disttrain_not_there'"),
        ("from disttrain.errors import ConfigError\nraise ConfigError('one line')", "raises ConfigError: one line"),
        ("make = 3", "a int, which cannot be called"),
        ("globals()['other'] = 1", "has no 'make'"),
        ("make = lambda b: b", "got an unexpected keyword argument 'a'"),
    ],
)
def test_import_reports_errors_that_the_source_does_not_show(
    source: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from disttrain.cli.check import check_config

    (tmp_path / "hidden_parts.py").write_text(source + "\nglobals\n")  # code may add names, so the source cannot decide
    (tmp_path / "c.yaml").write_text("run: {seed: 1}\nmodel: {target: 'hidden_parts:make', args: {a: 1}}\n")
    path = str(tmp_path / "c.yaml")
    assert check_config(path, [], as_json=True, imports=False) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    try:
        assert check_config(path, [], as_json=True, imports=True) == 2
    finally:
        sys.modules.pop("hidden_parts", None)
    (fault,) = json.loads(capsys.readouterr().out)["problems"]
    assert (fault["key"], fault["where"]) == ("model.target", f"{path}:2")
    assert found in fault["problem"]
