"""slurm/train.sbatch on SLURM's real daemons: one world over two nodes, with the numbers of a world of one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import PROJECT, column, metrics, only_run, plain, status, user_environment
from slurm_cluster import NODES, SlurmCluster, free_ports, missing_parts, running_cluster, write_slurm_conf

SCRIPT = PROJECT / "slurm" / "train.sbatch"
# One thread a node: both nodes are this machine, and each rank takes all cores of its node for its own.
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
    folder = Path(tempfile.mkdtemp(prefix="disttrain-slurm-"))  # short: a socket's path has 108 characters
    try:
        with running_cluster(folder, user_environment()) as running:
            yield running
    finally:
        shutil.rmtree(folder)


def run_job(cluster: SlurmCluster, folder: Path, *arguments: str, cwd: Path = PROJECT) -> tuple[str, str]:
    """sbatch slurm/train.sbatch ARGUMENTS, waited for: the job's state and what it printed."""
    printed = folder / "job.out"
    job = cluster.submit(SCRIPT, *arguments, cwd=cwd, options=[f"--output={printed}"])
    state = cluster.wait(job, timeout_s=240)
    return state, printed.read_text(encoding="utf-8") if printed.exists() else cluster.logs()


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """A folder whose `disttrain.run` only says who it is, so that the script is tested apart from training."""
    room = tmp_path / "payload" / "disttrain"
    room.mkdir(parents=True)
    (room / "__init__.py").touch()
    (room / "run.py").write_text(PAYLOAD, encoding="utf-8")
    return room.parent


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
        # 2e-5: float32 sums in another order over 20 steps of AdamW, the bound
        assert column(over_nodes, key) == pytest.approx(expected, rel=2e-5)


def test_configuration_names_both_nodes_on_their_own_ports(tmp_path: Path) -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    text = write_slurm_conf(tmp_path, host="here", ports=ports, cpus=4).read_text(encoding="utf-8")
    for name, port in zip(NODES, ports[1:], strict=True):
        assert f"NodeName={name} NodeHostname=here NodeAddr=127.0.0.1 Port={port} CPUs=4 " in text
    assert f"SlurmctldPort={ports[0]}" in text
