"""Starts a real SLURM cluster of two nodes on this machine, in a temporary folder and on free ports.

The daemons are munged, slurmctld and two slurmd. All of them end with the context, and so does everything that their
jobs leave behind. `missing_parts` says why no cluster can start: the daemons are not installed, or the user is not
root, and then slurmd cannot start jobs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "sinfo", "scancel")
NODES = ("n0", "n1")
START_TIMEOUT_S = 60.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def missing_parts() -> str | None:
    """Return why no cluster can start here, or None."""
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts jobs as their user, which takes root"
    return None


def free_ports(count: int) -> list[int]:
    """Return different ports on which no process listens now."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def write_slurm_conf(folder: Path, *, host: str, ports: Sequence[int], cpus: int) -> Path:
    """Write slurm.conf for two nodes. Both are this machine and offer `cpus` cores each."""
    controller, *node_ports = ports
    lines = [
        "ClusterName=disttrain",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        # a job's port follows from its id, and two clusters at the same time must not share ports
        f"FirstJobId={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "CredType=cred/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmdSpoolDir={folder}/spool-%n",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerType=sched/builtin",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "MessageTimeout=30",
        "KillWait=2",
        *(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=512"
            for name, port in zip(NODES, node_ports, strict=True)
        ),
        f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]
    path = folder / "slurm.conf"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class SlurmCluster:
    """A running cluster. Its commands and jobs have the variables in `environment`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)

    def run(self, *command: str, cwd: Path | None = None, timeout_s: float = 60.0) -> str:
        """Run one SLURM command and return its stdout. Raises RuntimeError with its stderr if it fails."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: Path, *arguments: str, cwd: Path, options: Sequence[str] = ()) -> int:
        """Run sbatch SCRIPT ARGUMENTS in `cwd` and return the job's id."""
        return int(self.run("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd).strip())

    def wait(self, job: int | str, *, timeout_s: float) -> str:
        """Return the state in which a job ended (`COMPLETED`, `FAILED`, ...).

        Cancels the job and raises TimeoutError after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        state = "UNKNOWN"
        while time.monotonic() < deadline:
            fields = dict(
                part.split("=", 1)
                for part in self.run("scontrol", "show", "job", str(job), "--oneliner").split()
                if "=" in part
            )
            state = fields["JobState"]
            if state in ENDED:
                return state
            time.sleep(0.25)
        self.run("scancel", str(job))
        raise TimeoutError(f"job {job} was still {state} after {timeout_s:.0f} s")

    def logs(self) -> str:
        """Return the last lines of each daemon's log, for the message of a failed test."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )


def _wait_until_idle(cluster: SlurmCluster, daemons: Mapping[str, subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    seen = ""
    while time.monotonic() < deadline:
        ended = [name for name, process in daemons.items() if process.poll() is not None]
        if ended:
            raise RuntimeError(f"ended at start: {', '.join(ended)}\n{cluster.logs()}")
        with suppress(RuntimeError):  # the controller does not listen yet
            seen = cluster.run("sinfo", "--noheader", "--Node", "--format=%N %t")
            if sorted(seen.split("\n"))[-2:] == [f"{name} idle" for name in NODES]:
                return
        time.sleep(0.2)
    raise RuntimeError(f"nodes not idle after {START_TIMEOUT_S:.0f} s, sinfo says: {seen}\n{cluster.logs()}")


def _processes_of(folder: Path) -> list[int]:
    """Return the ids of all processes whose environment names the cluster's folder: daemons, steps and jobs."""
    needle = str(folder).encode()
    ids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it ended while we looked
                if needle in (entry / "environ").read_bytes():
                    ids.append(int(entry.name))
    return ids


def _stop(cluster: SlurmCluster, daemons: Mapping[str, subprocess.Popen[bytes]]) -> None:
    with suppress(RuntimeError, subprocess.TimeoutExpired):  # a controller that is gone has no jobs to cancel
        cluster.run("scancel", "--state=RUNNING", "--user=root", timeout_s=10)
        cluster.run("scancel", "--state=PENDING", "--user=root", timeout_s=10)
    for process in reversed(list(daemons.values())):
        process.terminate()
    for process in reversed(list(daemons.values())):
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=5)
    deadline = time.monotonic() + 15
    while (left := _processes_of(cluster.folder)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    assert not left, f"processes left behind: {left}"


@contextmanager
def running_cluster(folder: Path, environment: Mapping[str, str]) -> Iterator[SlurmCluster]:
    """Start the daemons in the empty `folder`, yield when both nodes are idle, and stop everything at the end."""
    host = socket.gethostname().split(".")[0]
    conf = write_slurm_conf(folder, host=host, ports=free_ports(1 + len(NODES)), cpus=os.cpu_count() or 1)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    environment = {**environment, "SLURM_CONF": str(conf)}
    cluster = SlurmCluster(folder, environment)
    munge_files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
    commands = {
        "munged": ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files],
        "slurmctld": ["slurmctld", "-D", "-i", "-f", str(conf)],
        **{f"slurmd-{node}": ["slurmd", "-D", "-N", node, "-f", str(conf)] for node in NODES},
    }
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                daemons[name] = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                )
            if name == "munged":
                _wait_for_socket(folder / "munge.socket", cluster)
        _wait_until_idle(cluster, daemons)
        yield cluster
    finally:
        _stop(cluster, daemons)


def _wait_for_socket(path: Path, cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"munged made no socket in {START_TIMEOUT_S:.0f} s\n{cluster.logs()}")
        time.sleep(0.05)
