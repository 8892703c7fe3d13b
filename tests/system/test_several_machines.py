"""Runs the commands of docs/tutorials/several-machines.md with two torchrun agents, one per machine.

Both machines are this one. Each has a separate folder with a copy of the project's configs and scripts, which stands
for its local disk. The page's /shared is a folder that both see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, column, metrics, status, user_environment
from tutorial import Block, blocks, missing_line

PAGE = PROJECT / "docs" / "tutorials" / "several-machines.md"
TIMEOUT_S = 300.0


def page_blocks(heading: str) -> list[Block]:
    """The blocks below a heading of the page."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [one for one in sections if one.startswith(f"{heading}\n")]
    return blocks(section)


@dataclass
class Machines:
    """Two folders, each with a bash that runs commands of the page."""

    folder: Path

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def start(self, command: str) -> list[subprocess.Popen[str]]:
        """Run the same command on both machines."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        typed = command.replace("node1:29500", f"127.0.0.1:{port}").replace("/shared", str(self.shared))
        typed = typed.replace("IFNAME=eth0", "IFNAME=lo")
        return [
            subprocess.Popen(
                ["bash", "-c", typed],
                cwd=self.folder / name,
                # Both machines share these cores: idle threads must not spin.
                env=user_environment(THIS_TEST=str(self.folder), OMP_WAIT_POLICY="PASSIVE"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for name in ("node1", "node2")
        ]

    def wait(self, agents: list[subprocess.Popen[str]], expect: int = 0) -> str:
        """Wait for both commands and return what they printed."""
        printed = "".join(agent.communicate(timeout=TIMEOUT_S)[0] for agent in agents)
        assert [agent.returncode for agent in agents] == [expect, expect], printed
        return printed

    def processes(self) -> list[int]:
        """The ids of all processes that the machines have started, agents and workers."""
        needle = f"THIS_TEST={self.folder}".encode()
        ids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it has ended
                    if needle in (entry / "environ").read_bytes().split(b"\0"):
                        ids.append(int(entry.name))
        return ids

    def worker_of(self, name: str) -> int:
        """The id of the one process that trains on a machine."""
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.processes()}
        trains = [pid for pid, command in commands.items() if b"disttrain.run" in command and b"--rdzv" not in command]
        (worker,) = [pid for pid in trains if Path(f"/proc/{pid}/cwd").resolve() == self.folder / name]
        return worker

    def await_checkpoint(self, run: str) -> None:
        """Return once a run has saved."""
        deadline = time.monotonic() + TIMEOUT_S
        while not any((self.shared / "runs" / run / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline, f"{run} has no checkpoint after {TIMEOUT_S:.0f} s"
            time.sleep(0.1)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    for name in ("node1", "node2"):
        for part in ("configs", "launch"):
            shutil.copytree(PROJECT / part, tmp_path / name / part)
    found = Machines(tmp_path)
    yield found
    for pid in found.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_shown(block: Block, printed: str) -> None:
    assert block.language == "text"
    missing = missing_line(block.body.splitlines(), printed)
    assert missing is None, f"not printed, or not in this order: {missing}\n{printed}"


def segments(run: Path) -> list[dict[str, Any]]:
    """Each start of a run, from its ledger."""
    lines = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "segment"]


def test_page_starts_one_run_and_continues_it(machines: Machines) -> None:
    start, shown, by_hand, shown_later = page_blocks("Start the run")
    assert_shown(shown, machines.wait(machines.start(start.body)))
    assert_shown(shown_later, machines.wait(machines.start(by_hand.body)))
    assert {line["world_size"] for line in metrics(machines.shared / "runs" / "custom_net")} == {2}


@pytest.mark.slow
def test_page_replicates_over_machines_with_the_same_losses(machines: Machines) -> None:
    command, shown = page_blocks("Shards within a machine, replicas across machines")
    printed = machines.wait(machines.start(command.body))
    assert_shown(shown, printed)
    # The page shows these losses for two processes under ddp.
    assert shown.body.splitlines()[1:4] == page_blocks("Start the run")[1].body.splitlines()[1:4]
    assert sorted(column(machines.shared / "runs" / "hsdp", "loss"))[-1] == 100


def test_page_shows_the_error_for_a_folder_that_is_not_shared(machines: Machines) -> None:
    command, shown, _ = page_blocks("Without a shared file system")
    assert_shown(shown, machines.wait(machines.start(command.body), expect=1))


def test_page_shows_what_a_killed_worker_looks_like(machines: Machines) -> None:
    command, shown = page_blocks("When something fails")
    agents = machines.start(command.body)
    machines.await_checkpoint("killed")
    os.kill(machines.worker_of("node2"), signal.SIGKILL)
    assert_shown(shown, machines.wait(agents, expect=1))
    assert machines.processes() == []


def test_page_restarts_from_the_last_checkpoint(machines: Machines) -> None:
    command, shown = page_blocks("Restart without you")
    agents = machines.start(command.body)
    machines.await_checkpoint("restarted")
    os.kill(machines.worker_of("node2"), signal.SIGKILL)
    printed = machines.wait(agents)
    run = machines.shared / "runs" / "restarted"
    assert status(run)["state"] == "finished", printed
    first, second = segments(run)
    assert (first["step"], second["world_size"]) == (0, 2)
    assert second["step"] >= 20
    assert second["step"] % 20 == 0
    assert_shown(shown, (run / "ledger.jsonl").read_text(encoding="utf-8"))
