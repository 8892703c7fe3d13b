"""Every launcher's environment as a table, and the rejection of contradictory environments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.errors import LaunchError
from disttrain.runtime import Launch, environment, read_launch
from disttrain.runtime.environment import (
    accelerate_variables,
    cpu_quota,
    export_for_libraries,
    first_host,
    quiet_torch,
    wished_threads,
)

ELASTIC = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "quick",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[003-006,9],login1",
    "SLURM_RESTART_COUNT": "1",
}
# The variables that accelerate's single-process launcher exports, for num_processes: 1.
ACCELERATE_ONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "OMP_NUM_THREADS": "2"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
ALONE_EACH = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ALONE = Launch("plain python", rank=0, local_rank=0, world_size=1, local_world_size=1)
STEP_PORT = 15000 + (4711 * 31 + 3) % 15000


@pytest.mark.parametrize(
    ("environ", "expected"),
    {
        "nothing": ({}, ALONE),
        "an sbatch script, before any srun": (
            {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
            ALONE,
        ),
        "torchrun": (ELASTIC, Launch("torchrun", 5, 1, 8, 4, "node0", 29400, 2, "quick")),
        "torchrun in a SLURM job": (
            {**SRUN, **ELASTIC},
            Launch("torchrun", 5, 1, 8, 4, "node0", 29400, 2, "4711"),
        ),
        "accelerate launch": (
            {**ELASTIC, "ACCELERATE_MIXED_PRECISION": "no"},
            Launch("accelerate launch", 5, 1, 8, 4, "node0", 29400, 2, "quick"),
        ),
        "accelerate launch of one process": (ACCELERATE_ONE, ALONE),
        "a setting of accelerate's, and no launch of it": (
            {**ELASTIC, "ACCELERATE_LOG_LEVEL": "debug"},
            Launch("torchrun", 5, 1, 8, 4, "node0", 29400, 2, "quick"),
        ),
        "DeepSpeed's own launcher, as accelerate starts it for several machines": (
            {
                **BY_HAND,
                "ACCELERATE_MIXED_PRECISION": "no",
                "WORLD_SIZE": "8",
                "RANK": "5",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "4",
            },
            Launch("environment", 5, 1, 8, 4, "10.0.0.1", 1234),
        ),
        "mpirun, and each a world of one by the user's word": (
            {**BY_HAND, "RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4"},
            Launch("environment", 0, 0, 1, 1, "10.0.0.1", 1234),
        ),
        "mpirun of torchruns that know each other": (
            {**ELASTIC, "OMPI_COMM_WORLD_SIZE": "2"},
            Launch("torchrun", 5, 1, 8, 4, "node0", 29400, 2, "quick"),
        ),
        "mpirun of one": ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, ALONE),
        "set by hand, one process a node": (BY_HAND, Launch("environment", 1, 0, 2, 1, "10.0.0.1", 1234)),
        "set by hand, all on this node": (
            {**BY_HAND, "LOCAL_RANK": "1"},
            Launch("environment", 1, 1, 2, 2, "10.0.0.1", 1234),
        ),
        "srun": (SRUN, Launch("srun", 6, 0, 7, 1, "gpu003", STEP_PORT, 1, "4711")),
        "srun, a node with two tasks": (
            {**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
            Launch("srun", 3, 1, 7, 2, "gpu003", STEP_PORT, 1, "4711"),
        ),
        "srun, another step of the job": (
            {**SRUN, "SLURM_STEP_ID": "4"},
            Launch("srun", 6, 0, 7, 1, "gpu003", STEP_PORT + 1, 1, "4711"),
        ),
        "srun, where to meet said by the user": (
            {**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "777"},
            Launch("srun", 6, 0, 7, 1, "head", 777, 1, "4711"),
        ),
        "srun --ntasks=1": (
            {
                **SRUN,
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_PROCID": "0",
                "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "1",
            },
            Launch("srun", 0, 0, 1, 1, "gpu003", STEP_PORT, 1, "4711"),
        ),
    }.values(),
    ids=lambda value: value.launcher if isinstance(value, Launch) else f"{len(value)} variables",
)
def test_every_launcher_is_known(environ: dict[str, str], expected: Launch) -> None:
    assert read_launch(environ) == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "problem: RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "problem: WORLD_SIZE but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": ""}, "problem: none but not RANK"),
        ({**BY_HAND, "RANK": "2"}, "problem: rank 2 of 2"),
        ({**BY_HAND, "RANK": "-1"}, "problem: rank -1 of 2"),
        ({**BY_HAND, "WORLD_SIZE": "0"}, "problem: rank 1 of 0"),
        ({**BY_HAND, "RANK": "one"}, "RANK must be an integer.\n  problem: 'one'"),
        ({**BY_HAND, "MASTER_PORT": "http"}, "MASTER_PORT must be an integer.\n  problem: 'http'"),
        # torchrun --master_port=0 passes the 0 on, and its processes would wait for port 0 until run.timeout_s
        ({**ELASTIC, "MASTER_PORT": "0"}, "processes of this world cannot connect.\n  problem: MASTER_PORT=0"),
        ({**SRUN, "MASTER_PORT": "0"}, "processes of this world cannot connect.\n  problem: MASTER_PORT=0"),
        ({**ELASTIC, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**ELASTIC, "LOCAL_WORLD_SIZE": "1"}, "local rank 1 of 1"),
        ({**SRUN, "SLURM_PROCID": "7"}, "srun states an impossible rank.\n  problem: rank 7 of 7"),
        ({**SRUN, "SLURM_LOCALID": "1"}, "local rank 1 of 1"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS must be an integer"),
        # MULTI_CPU, or no type, with num_processes: 2: accelerate exports the address, and starts one process
        ({**ACCELERATE_ONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "started fewer processes"),
        (
            {**SRUN, **ACCELERATE_ONE, "MASTER_ADDR": "127.0.0.1"},
            "problem: a world of 1: accelerate starts one process for distributed_type MULTI_CPU",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 processes that were started together (OMPI_COMM_WORLD_SIZE=2)"),
        ({"PMI_SIZE": "3"}, "problem: plain python makes this process a world of one"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, "MV2_COMM_WORLD_SIZE=4"),
        ({**ACCELERATE_ONE, "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({**ELASTIC, **ALONE_EACH, "OMPI_COMM_WORLD_SIZE": "2"}, "torchrun makes this process a world of one"),
        ({**ELASTIC, **ALONE_EACH, **SRUN, **ACCELERATE_ONE}, "SLURM_STEP_NUM_TASKS=7"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu["}, "Cannot read SLURM's node list.\n  problem: 'gpu['"),
    ],
)
def test_an_environment_that_contradicts_itself_is_rejected(environ: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError) as refused:
        read_launch(environ)
    assert said in str(refused.value)
    assert "fix: " in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "asked", "refused"),
    [
        ({**ELASTIC, "ACCELERATE_MIXED_PRECISION": "no"}, 8, False),
        # nine over two machines: accelerate starts four on each
        ({**ELASTIC, "ACCELERATE_MIXED_PRECISION": "no"}, 9, True),
        ({**ELASTIC, "ACCELERATE_MIXED_PRECISION": "no"}, None, False),
        (ACCELERATE_ONE, 1, False),
        (ACCELERATE_ONE, 2, True),
        # exported by a batch script, not by accelerate
        ({**ACCELERATE_ONE, "MASTER_ADDR": "head"}, 1, False),
        (ELASTIC, 9, False),
    ],
)
def test_fewer_processes_than_requested_from_accelerate(
    environ: dict[str, str], asked: int | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "asked_processes", lambda environ: asked)
    if not refused:
        assert read_launch(environ).world_size == int(environ.get("WORLD_SIZE", 1))
        return
    with pytest.raises(LaunchError, match="problem: a world of"):
        read_launch(environ)


def test_accelerates_variables_are_read_only_under_its_launch() -> None:
    handed = {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    assert accelerate_variables({**handed, "HOME": "/root", "LD_LIBRARY_PATH": ""}) == handed
    assert accelerate_variables({**ELASTIC, "FSDP_VERSION": "2"}) == {}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[003-006,9],login1", "gpu003"),
        ("login1,gpu[003-006,9]", "login1"),
        ("n0", "n0"),
        ("gpu-[1-3]-ib,x", "gpu-1-ib"),
        ("rack[2-3]node[07,09-11]", "rack2node07"),
        ("a.b-c_d[10]", "a.b-c_d10"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5), st.data())
def test_every_task_of_an_srun_gets_its_rank(nodes: list[tuple[int, int]], data: st.DataObject) -> None:
    tasks = [count for count, times in nodes for _ in range(times)]
    node = data.draw(st.integers(0, len(tasks) - 1))
    local = data.draw(st.integers(0, tasks[node] - 1))
    pattern = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in nodes)
    environ = {
        **SRUN,
        "SLURM_STEP_NUM_TASKS": str(sum(tasks)),
        "SLURM_STEP_TASKS_PER_NODE": pattern,
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_PROCID": str(sum(tasks[:node]) + local),
    }
    found = read_launch(environ)
    assert (found.rank, found.local_rank) == (sum(tasks[:node]) + local, local)
    assert (found.world_size, found.local_world_size) == (sum(tasks), tasks[node])


def test_the_environment_of_this_process_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "ACCELERATE_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in BY_HAND.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch("environment", 1, 0, 2, 1, "10.0.0.1", 1234)
    assert read_launch().described == "environment: 2 process(es), 1 on this node"


@pytest.mark.parametrize(
    ("text", "launcher", "threads"),
    [
        (None, "plain python", None),
        ("4", "plain python", 4),
        ("1", "plain python", 1),
        ("1", "environment", 1),
        ("1", "srun", 1),
        ("4", "torchrun", 4),
        # torchrun writes 1 if nothing is set, so the value is not a user's choice.
        ("1", "torchrun", None),
        ("1", "accelerate launch", None),
        # accelerate launch writes the host's cores, regardless of the container's share of them.
        ("64", "accelerate launch", None),
        ("0", "srun", None),
        ("-2", "srun", None),
        ("", "srun", None),
        ("all", "srun", None),
        ("²", "srun", None),
        (" 3 ", "srun", 3),
        ("6,2", "srun", 6),
    ],
)
def test_the_users_setting_for_threads(text: str | None, launcher: str, threads: int | None) -> None:
    environ = {} if text is None else {"OMP_NUM_THREADS": text}
    assert wished_threads(Launch(launcher, 0, 0, 1, 1), environ) == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are bound on Linux only")
def test_no_more_cores_than_this_process_may_use() -> None:
    code = (
        "import os; from disttrain.runtime.environment import cpu_quota\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(cpu_quota())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert found.stdout == "1\n"
    assert 1 <= cpu_quota() <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(not Path("/sys/fs/cgroup/cpu.max").exists(), reason="no cgroup v2 quota here")
def test_no_more_cores_than_the_container_may_use() -> None:
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    assert quota == "max" or cpu_quota() <= max(1, int(quota) / int(period))


def test_variables_for_libraries_are_written_and_a_users_level_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    quiet_torch()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "INFO"
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    quiet_torch()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    export_for_libraries(Launch("torchrun", 3, 1, 4, 2), {"DS_ACCELERATOR": "cpu"})
    assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == ("1", "cpu")


def test_reading_the_launch_imports_no_torch() -> None:
    code = "import sys; from disttrain.runtime import read_launch; read_launch(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert found.stdout == "False\n"
