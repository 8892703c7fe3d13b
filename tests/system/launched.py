"""Starts disttrain as a user does, in separate processes with a hard time limit, and reads what a run left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
# Set by a launcher that started the tests. The runs below must not use it.
FOREIGN = ("SLURM_", "ACCELERATE_", "TORCHELASTIC_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def user_environment(**extra: str) -> dict[str, str]:
    """The environment of a user in this project's folder: its commands are first in PATH, one thread per process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    paths = [str(PROJECT), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def launch(
    *command: str,
    timeout_s: float,
    cwd: Path = PROJECT,
    environment: Mapping[str, str] | None = None,
    expect: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. After `timeout_s` its process group is killed. `expect` is its exit code."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment or user_environment()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        print(f"{' '.join(command)}\n{out[-4000:]}\n{err[-8000:]}", file=sys.stderr)
        raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if expect is not None and done.returncode != expect:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{out[-4000:]}\n{err[-8000:]}")
    return done


def plain(config: Path | str, *overrides: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """`python -m disttrain.run CONFIG ...`: a world of one."""
    return launch(sys.executable, "-m", "disttrain.run", str(config), *overrides, timeout_s=timeout_s)


def torchrun(
    processes: int, config: Path | str, *overrides: str, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc_per_node=N -m disttrain.run CONFIG ...`."""
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return launch(*agent, "-m", "disttrain.run", str(config), *overrides, timeout_s=timeout_s)


def metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(run: Path, key: str) -> dict[int, float]:
    """Maps step to value, for the lines of a run's metrics that have the key."""
    return {line["step"]: line[key] for line in metrics(run) if key in line}


def status(run: Path) -> dict[str, Any]:
    """A run's status.json."""
    found: dict[str, Any] = json.loads((run / "status.json").read_text(encoding="utf-8"))
    return found


def only_run(folder: Path) -> Path:
    """The one run below `run.dir`."""
    runs: Sequence[Path] = [path for path in folder.iterdir() if path.is_dir()]
    assert len(runs) == 1, f"expected one run in {folder}, found {[path.name for path in runs]}"
    return runs[0]
