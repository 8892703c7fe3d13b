"""Runs slurm/train.sbatch and the commands of docs/tutorials/slurm.md on SLURM's real daemons.

One job is one world over two nodes, and its losses are those of a single process.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, column, metrics, only_run, plain, status, user_environment
from slurm_cluster import NODES, SlurmCluster, free_ports, missing_parts, running_cluster, write_slurm_conf
from tutorial import Block, Shell, blocks, missing_line

SCRIPT = PROJECT / "slurm" / "train.sbatch"
# Both nodes are this machine. Without run.threads each rank would use as many threads as the machine has cores.
STEPS = ("run.steps=20", "run.threads=1", "report.every=1", "report.progress=false", "eval.at_end=false")

PAYLOAD = """
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
mine = torch.tensor([float(os.environ["SLURM_NODEID"])])
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(mine)
dist.all_reduce(total)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "nodes", mine.item(), "sum", total.item(), *sys.argv[1:])
sys.stdout.flush()
code = int(sys.argv[2].split("=")[1]) if dist.get_rank() == 1 else 0
dist.destroy_process_group()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = missing_parts()
    if reason:
        pytest.skip(reason)
    # short, because a socket's path is limited to 108 characters
    folder = Path(tempfile.mkdtemp(prefix="disttrain-slurm-"))
    try:
        with running_cluster(folder, user_environment()) as running:
            yield running
    finally:
        shutil.rmtree(folder)


def run_job(cluster: SlurmCluster, folder: Path, *arguments: str, cwd: Path = PROJECT) -> tuple[str, str]:
    """Submit slurm/train.sbatch, wait for the job's end, and return its state and its output."""
    printed = folder / "job.out"
    job = cluster.submit(SCRIPT, *arguments, cwd=cwd, options=[f"--output={printed}"])
    state = cluster.wait(job, timeout_s=240)
    return state, printed.read_text(encoding="utf-8") if printed.exists() else cluster.logs()


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """A folder whose `disttrain.run` only prints its rank, so that the script is tested apart from training."""
    package = tmp_path / "payload" / "disttrain"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "run.py").write_text(PAYLOAD, encoding="utf-8")
    return package.parent


def test_script_starts_one_world_over_both_nodes(
    cluster: SlurmCluster, tmp_path: Path, payload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.environment, "PYTHONPATH", str(payload))
    state, printed = run_job(cluster, tmp_path, "a.yaml", "code=0", cwd=payload)
    assert state == "COMPLETED", printed
    for rank in (0, 1):
        assert f"rank {rank} of 2 nodes 1.0 sum 3.0 a.yaml code=0" in printed


def test_job_fails_when_one_rank_fails(
    cluster: SlurmCluster, tmp_path: Path, payload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.environment, "PYTHONPATH", str(payload))
    state, printed = run_job(cluster, tmp_path, "a.yaml", "code=6", cwd=payload)
    assert state == "FAILED", printed


@pytest.mark.slow
def test_losses_equal_a_world_of_one(cluster: SlurmCluster, tmp_path: Path) -> None:
    state, printed = run_job(cluster, tmp_path, "configs/quickstart.yaml", f"run.dir={tmp_path / 'slurm'}", *STEPS)
    assert state == "COMPLETED", printed
    plain("configs/quickstart.yaml", f"run.dir={tmp_path / 'plain'}", *STEPS)
    over_nodes, alone = only_run(tmp_path / "slurm"), only_run(tmp_path / "plain")
    assert {line["world_size"] for line in metrics(over_nodes)} == {2}
    assert {line["world_size"] for line in metrics(alone)} == {1}
    assert status(over_nodes)["state"] == "finished"
    for key in ("loss", "grad_norm"):
        expected = column(alone, key)
        assert sorted(expected) == list(range(1, 21))
        # 2e-5: the order of float32 sums differs over 20 steps of AdamW
        assert column(over_nodes, key) == pytest.approx(expected, rel=2e-5)


def test_configuration_names_both_nodes_on_their_own_ports(tmp_path: Path) -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    text = write_slurm_conf(tmp_path, host="here", ports=ports, cpus=4).read_text(encoding="utf-8")
    for name, port in zip(NODES, ports[1:], strict=True):
        assert f"NodeName={name} NodeHostname=here NodeAddr=127.0.0.1 Port={port} CPUs=4 " in text
    assert f"SlurmctldPort={ports[0]}" in text


# ---------------------------------------------------------------------- docs/tutorials/slurm.md


PAGE = PROJECT / "docs" / "tutorials" / "slurm.md"


def page_blocks(heading: str) -> list[Block]:
    """The blocks below a heading of the page."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [one for one in sections if one.startswith(f"{heading}\n")]
    return blocks(section)


@pytest.fixture
def terminal(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Shell]:
    """A reader's terminal on the cluster, in a folder with the project's configs and scripts."""
    for name in ("configs", "slurm"):
        (tmp_path / name).symlink_to(PROJECT / name)
    with Shell(tmp_path, PROJECT, timeout_s=300.0) as shell:
        # Both nodes share these cores: idle threads must not spin.
        shell.run(
            f"export SLURM_CONF={cluster.environment['SLURM_CONF']} MASTER_ADDR=127.0.0.1 OMP_WAIT_POLICY=PASSIVE"
        )
        yield shell


def type_block(shell: Shell, block: Block) -> str:
    """Run a bash block as typed into the terminal and return what it printed."""
    ran = shell.run(block.body)
    assert ran.code == 0, f"{block.body}\n{ran.output}"
    return ran.output


def submitted(shell: Shell, printed: str = "") -> list[int]:
    """The jobs that a block has submitted: those it printed, else the one in `$job`."""
    found = re.findall(r"Submitted batch job (\d+)", printed) or [shell.run("echo $job").output.strip()]
    return [int(job) for job in found]


def segments(run: Path) -> list[dict[str, Any]]:
    """Each start of a run, from its ledger."""
    path = run / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == "segment"]


def wait_until(reached: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not after {timeout_s:.0f} s"
        time.sleep(0.2)


def test_page_submits_follows_and_reads_a_job(cluster: SlurmCluster, terminal: Shell, tmp_path: Path) -> None:
    submit, script = (block for block in page_blocks("Submit a job") if block.language == "bash")
    # The page shows the script as it is.
    assert script.body in SCRIPT.read_text(encoding="utf-8")
    assert "disttrai" in type_block(terminal, submit)  # squeue truncates the job's name to eight characters
    (job,) = submitted(terminal)
    assert cluster.wait(job, timeout_s=240) == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()
    read, shown = page_blocks("Read the result")
    printed = type_block(terminal, read)
    assert missing_line(shown.body.splitlines(), printed) is None, printed
    (start,) = segments(tmp_path / "runs" / "on-slurm")
    assert (start["job"], start["world_size"]) == (str(job), 2)


def test_page_continues_in_the_next_job_of_a_chain(cluster: SlurmCluster, terminal: Shell, tmp_path: Path) -> None:
    chain = page_blocks("Continue after a time limit or a lost node")[0]
    first, second = submitted(terminal, type_block(terminal, chain))
    run = tmp_path / "runs" / "long"
    wait_until(lambda: any(run.glob("checkpoints/step-*")), "a checkpoint of the first job")
    cluster.run("scancel", str(first))  # like a time limit
    cluster.wait(first, timeout_s=60)
    assert cluster.wait(second, timeout_s=240) == "COMPLETED", (tmp_path / f"slurm-{second}.out").read_text()
    assert status(run)["state"] == "finished"
    assert segments(run)[-1]["job"] == str(second)
    assert segments(run)[-1]["step"] >= 20


def test_page_continues_a_requeued_job(cluster: SlurmCluster, terminal: Shell, tmp_path: Path) -> None:
    submit, requeue = page_blocks("Continue after a time limit or a lost node")[1].body.splitlines()
    terminal.run(submit)
    (job,) = submitted(terminal)
    run = tmp_path / "runs" / "requeued"
    wait_until(lambda: any(run.glob("checkpoints/step-*")), "a checkpoint before the requeue")
    ran = terminal.run(requeue)
    assert ran.code == 0, ran.output
    # SLURM 22.05 holds a requeued job for 121 s. The test does not wait.
    wait_until(lambda: _start_now(cluster, job), "the requeued job's second start")
    wait_until(lambda: len(segments(run)) == 2, "the second start in the ledger")
    cluster.run("scancel", str(job))
    assert {start["job"] for start in segments(run)} == {str(job)}
    assert segments(run)[1]["step"] >= 20
    cluster.wait(job, timeout_s=60)


def _start_now(cluster: SlurmCluster, job: int) -> bool:
    """Ask for an immediate start. Returns whether the job runs."""
    with suppress(RuntimeError):  # still completing, or running already
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    return "JobState=RUNNING" in cluster.run("scontrol", "show", "job", str(job)) and "Restarts=1" in cluster.run(
        "scontrol", "show", "job", str(job)
    )


def test_page_trains_one_run_per_seed(cluster: SlurmCluster, terminal: Shell, tmp_path: Path) -> None:
    submit, report = page_blocks("One job per seed")
    (array,) = submitted(terminal, type_block(terminal, submit))
    for seed in (1, 2):
        state = cluster.wait(f"{array}_{seed}", timeout_s=240)
        assert state == "COMPLETED", (tmp_path / f"slurm-{array}-{seed}.out").read_text()
    printed = type_block(terminal, report)
    assert "seed-1: finished" in printed
    assert "seed-2: finished" in printed
    first, second = (column(tmp_path / "runs" / f"seed-{seed}", "loss") for seed in (1, 2))
    assert first[1] != second[1]


def test_page_starts_ranks_with_srun(terminal: Shell, tmp_path: Path) -> None:
    (block,) = page_blocks("Without torchrun")
    type_block(terminal, block)
    (start,) = segments(tmp_path / "runs" / "by-srun")
    assert (start["launcher"], start["world_size"]) == ("srun", 2)
    assert status(tmp_path / "runs" / "by-srun")["state"] == "finished"
