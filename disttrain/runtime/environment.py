"""Reads rank, world size and address from the launcher's environment variables. The only file that reads `os.environ`.

Knows torchrun, `accelerate launch` (which uses torchrun), srun, and plain Python (a world of one). Rejects an
environment that contradicts itself before any process group exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from disttrain.errors import LaunchError, explain
from disttrain.runtime.accelerate_command import asked_processes


@dataclass(frozen=True)
class Launch:
    """Rank and world size of one process, as its launcher states them.

    `restarts` counts how often the launcher restarted this world. `job` is the launcher's name for the job.
    """

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    restarts: int = 0
    job: str = ""

    @property
    def described(self) -> str:
        """One line for log messages."""
        return f"{self.launcher}: {self.world_size} process(es), {self.local_world_size} on this node"


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Return the launch that this process belongs to. Local.

    Raises LaunchError where the variables contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        launch = _checked(_torchrun(env))
        if launch.world_size == 1 and launch.launcher != "environment":  # set by hand, a world of one is intended
            _reject_separate_worlds(env, launch)
        if launch.launcher == "accelerate launch":
            _reject_missing_processes(asked_processes(env), launch.world_size)
        return launch
    if _by_accelerate(env):  # it sets MASTER_ADDR for several processes, even where it starts only one
        _reject_missing_processes(asked_processes(env) or (2 if env.get("MASTER_ADDR") else 1), 1)
    if _in_srun(env):
        return _checked(_srun(env))
    launch = Launch("plain python", rank=0, local_rank=0, world_size=1, local_world_size=1)
    _reject_separate_worlds(env, launch)
    return launch


def accelerate_variables(environ: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """Return the variables that `accelerate launch` set; empty where something else started this process. Local."""
    env = os.environ if environ is None else environ
    ours = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "WORLD_SIZE")
    return {name: text for name, text in env.items() if name.startswith(ours)} if _by_accelerate(env) else {}


def _by_accelerate(env: Mapping[str, str]) -> bool:
    return "ACCELERATE_MIXED_PRECISION" in env  # accelerate always sets this variable


def _in_srun(env: Mapping[str, str]) -> bool:
    return bool(env.get("SLURM_STEP_NUM_TASKS")) and env.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in env


def _reject_missing_processes(asked: int | None, started: int) -> None:
    if asked is not None and asked > started:
        raise LaunchError(
            explain(
                "accelerate launch started fewer processes than it was asked for.",
                f"a world of {started}: accelerate starts one process for distributed_type MULTI_CPU or NO, "
                "and num_processes // num_machines on each machine otherwise",
                "use distributed_type: MULTI_GPU, FSDP or DEEPSPEED (on CPU with use_cpu: true) and a num_processes "
                "that num_machines divides, or num_processes: 1",
            )
        )


# Launchers that state how many processes they started: OpenMPI, MPICH and Intel MPI, MVAPICH.
_STARTED_TOGETHER = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def _reject_separate_worlds(env: Mapping[str, str], launch: Launch) -> None:
    """Raise LaunchError where several processes would each be a world of one and share one run folder."""
    names = (*_STARTED_TOGETHER, *(["SLURM_STEP_NUM_TASKS"] if _in_srun(env) else []))
    for name in names:
        if env.get(name, "").isdecimal() and int(env[name]) > 1:
            raise LaunchError(
                explain(
                    f"Cannot join the {env[name]} processes that were started together ({name}={env[name]}).",
                    f"{launch.launcher} makes this process a world of one, so each process would train alone",
                    "start them with torchrun, srun or accelerate launch; if separate worlds are intended, "
                    "set RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0 in each process",
                )
            )


def _torchrun(env: Mapping[str, str]) -> Launch:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise LaunchError(
            explain(
                "The launcher set only some of the variables that state rank and world size.",
                f"{', '.join(name for name in needed if name not in missing) or 'none'} but not {', '.join(missing)}",
                "start with `torchrun --nproc_per_node=N -m disttrain.run CONFIG`, or unset them for a world of one",
            )
        )
    world = _number(env, "WORLD_SIZE")
    agent = "accelerate launch" if _by_accelerate(env) else "torchrun"
    return Launch(
        agent if "TORCHELASTIC_RUN_ID" in env else "environment",
        rank=_number(env, "RANK"),
        local_rank=_number(env, "LOCAL_RANK", 0),
        world_size=world,
        # DeepSpeed's launcher sets LOCAL_SIZE
        local_world_size=_number(
            env,
            "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE",
            min(world, 1) if "LOCAL_RANK" not in env else world,
        ),
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
        restarts=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        job=env.get("SLURM_JOB_ID") or env.get("TORCHELASTIC_RUN_ID", ""),
    )


def _srun(env: Mapping[str, str]) -> Launch:
    world = _number(env, "SLURM_STEP_NUM_TASKS")
    job = env.get("SLURM_JOB_ID", "0")
    here = _tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), _number(env, "SLURM_NODEID", 0), world)
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    step = _number(env, "SLURM_STEP_ID", 0)
    return Launch(
        "srun",
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID", 0),
        world_size=world,
        local_world_size=here,
        master_addr=env.get("MASTER_ADDR") or first_host(nodes),
        # One port for each job and step, equal on all nodes, below the ephemeral range of most systems (32768 up).
        master_port=_number(env, "MASTER_PORT", 15000 + (int(re.sub(r"\D", "", job) or 0) * 31 + step) % 15000),
        restarts=_number(env, "SLURM_RESTART_COUNT", 0),
        job=job,
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list such as `gpu[003-006,9],login1` (slurm.conf(5), NodeName)."""
    first = re.match(r"(?:[^\[\],]|\[\d[^\[\]]*\])+(?=,|$)", nodelist)
    if first is None:
        raise LaunchError(explain("Cannot read SLURM's node list.", repr(nodelist), "set MASTER_ADDR yourself"))
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _tasks_on_node(pattern: str, node: int, world: int) -> int:
    """Return the number of tasks on a node, from SLURM's `2(x3),1`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", pattern):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else world


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(
            explain(f"{name} must be an integer.", repr(text), "start with torchrun, srun or accelerate launch")
        ) from None


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size or not 0 <= launch.local_rank < launch.local_world_size:
        raise LaunchError(
            explain(
                f"{launch.launcher} states an impossible rank.",
                f"rank {launch.rank} of {launch.world_size}, "
                f"local rank {launch.local_rank} of {launch.local_world_size}",
                "start all processes with one launcher: torchrun, srun or accelerate launch",
            )
        )
    if launch.world_size > 1 and launch.master_port == 0:  # torch would wait for port 0 until run.timeout_s
        raise LaunchError(
            explain(
                f"The {launch.world_size} processes of this world cannot connect.",
                "MASTER_PORT=0, and torchrun passes the 0 of --master_port=0 on to its processes",
                "start with `torchrun --standalone` on one machine, or set --master_port to a free port",
            )
        )
    return launch


def export_for_libraries(launch: Launch, more: Mapping[str, str]) -> None:
    """Set variables that libraries read: DeepSpeed needs LOCAL_RANK even in a world of one. Local."""
    os.environ.update({"LOCAL_RANK": str(launch.local_rank), **more})


def quiet_torch() -> None:
    """Silence C++ warnings of torch about faults that Python handles. Local.

    Call it before torch is imported. A level that the user set stays.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def wished_threads(launch: Launch, environ: Mapping[str, str] | None = None) -> int | None:
    """Return OMP_NUM_THREADS if the user set it, None otherwise. Local.

    torchrun sets 1 where the variable is missing, and accelerate launch sets the host's cores. Neither is a user's
    wish. Of a list (OpenMP allows one number for each nesting level) the first number counts.
    """
    text = (os.environ if environ is None else environ).get("OMP_NUM_THREADS", "").split(",")[0].strip()
    by_launcher = launch.launcher == "accelerate launch" or (launch.launcher == "torchrun" and text == "1")
    return int(text) if text.isdecimal() and int(text) >= 1 and not by_launcher else None


def cpu_quota() -> int:
    """Return the number of cores this process may use: its affinity, limited by the container's quota. Local.

    The quota is that of cgroup v2, `cpu.max`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # noqa: PTH123 - a kernel file, read once
            quota, period = file.read().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
