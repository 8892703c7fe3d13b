"""The process group: collectives of values, the first cause of a failure, time limits, and a world of one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from world import free_port, run_world

from disttrain.errors import ConfigError, DataError, DisttrainError, LaunchError
from disttrain.runtime import Group, Launch, OtherRankError, choose_device, read_launch
from disttrain.runtime.process_group import launch_of_existing_group

CPU = choose_device("cpu", Launch("plain python", 0, 0, 1, 1))
PATIENCE_S = 120.0


def join(timeout_s: float = PATIENCE_S) -> Group:
    return Group(read_launch(), CPU, timeout_s=timeout_s)


def wait_until(holds: Callable[[], Any], what: str) -> Any:
    """Polls, because a rank cannot wait for another rank's message in the store. That is a deliberate limit."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.02)
    return found


def outcome(act: Callable[[], Any]) -> Any:
    """The outcome: a value, or the error's class, text and exit code."""
    try:
        return act()
    except DisttrainError as error:
        return type(error).__name__, str(error), error.exit_code


# ---------------------------------------------------------------------- values and agreement


def exchange() -> dict[str, Any]:
    group = join()
    rank, own = group.rank, {"rank": group.rank, "text": "x" * 1000 * group.rank}
    found = {
        "place": (group.rank, group.size, group.timeout_s, dist.get_backend()),
        "gather": group.gather(own),
        "gather_all": group.gather_all(rank),
        "broadcast": group.broadcast(f"from {rank}"),
        "minimum": group.minimum(-(10**12) + 5 * (rank - 1) ** 2),
        "nobody": outcome(lambda: group.agree(None, "reading")),
        "one": outcome(lambda: group.agree(DataError("torn") if rank == 1 else None, "reading the data")),
        "two": outcome(
            lambda: group.agree({1: DataError("torn"), 2: ConfigError("odd")}.get(rank), "reading the data")
        ),
        "still together": group.gather_all(rank),
    }
    group.barrier()
    group.close()
    group.close()
    again = join()  # a second world in the same processes does not read the messages of the first
    found["again"] = (again.first_failure(), again.gather_all(rank))
    again.close()
    return found


def plain_failure() -> Any:
    group = join()
    try:
        group.agree(ZeroDivisionError("division by zero") if group.rank == 0 else None, "building data.train")
    except (ZeroDivisionError, OtherRankError) as error:
        return type(error).__name__, str(error), getattr(error, "exit_code", None)
    finally:
        group.close()


def test_values_and_failures_over_three_ranks() -> None:
    ranks = run_world(3, exchange)
    everything = [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(3)]
    for rank, found in enumerate(ranks):
        assert found["place"] == (rank, 3, PATIENCE_S, "gloo")
        assert found["gather"] == (everything if rank == 0 else None)
        assert found["gather_all"] == found["still together"] == [0, 1, 2]
        assert found["broadcast"] == "from 0"
        assert found["minimum"] == -(10**12)
        assert found["nobody"] is None
        assert found["again"] == (None, [0, 1, 2])
    other = ("OtherRankError", "reading the data failed on rank 1: DataError: torn", DataError.exit_code)
    assert [found["one"] for found in ranks] == [other, ("DataError", "torn", 4), other]
    assert [found["two"] for found in ranks] == [other, ("DataError", "torn", 4), ("ConfigError", "odd", 2)]


def test_a_users_exception_is_reported_to_the_others_with_its_class() -> None:
    first, second = run_world(2, plain_failure)
    assert first == ("ZeroDivisionError", "division by zero", None)
    told = "building data.train failed on rank 0: ZeroDivisionError: division by zero"
    assert second == ("OtherRankError", told, 1)


# ---------------------------------------------------------------------- the first cause


def fail_in_turn() -> Any:
    group = join()
    nothing = group.first_failure()
    group.barrier()
    first = group.report_failure("4:DataError: item 3 has a colon: \udcff and 世界") if group.rank == 1 else None
    told = wait_until(group.first_failure, "rank 1 has told")
    later = group.report_failure("1:RuntimeError: connection reset by peer")
    found = nothing, first, told, later, group.first_failure()
    group.barrier()
    group.close()
    return found


def test_the_first_cause_is_known_to_all_and_stays() -> None:
    ranks = run_world(3, fail_in_turn)
    cause = (1, "4:DataError: item 3 has a colon: \\udcff and 世界")
    assert ranks == [(None, True if rank == 1 else None, cause, False, cause) for rank in range(3)]


def first_rank_fails_and_leaves() -> Any:
    group = join()
    try:
        if group.rank == 0:
            group.report_failure("4:DataError: torn")
            return group.first_failure()
        return wait_until(group.first_failure, "rank 0 has told")
    finally:
        group.close()


def first_rank_leaves_before_another_has_looked() -> Any:
    group = join()
    try:
        if group.rank == 1:
            group.report_failure("4:DataError: torn")
        if group.rank == 2:
            time.sleep(1.0)  # busy; the test makes no assertion about the time
            return group.first_failure()
        return wait_until(group.first_failure, "rank 1 has told")
    finally:
        group.close()


def test_rank_0_does_not_remove_the_first_cause_when_it_leaves() -> None:
    assert run_world(2, first_rank_fails_and_leaves) == [(0, "4:DataError: torn")] * 2
    assert run_world(3, first_rank_leaves_before_another_has_looked) == [(1, "4:DataError: torn")] * 3


def join_late(mark: Path) -> bool:
    """Whether rank 1, which connects slowly, was connected when this rank's group was made."""
    connect = dist.init_process_group

    def slow_connect(*args: Any, **named: Any) -> None:
        connect(*args, **named)
        time.sleep(0.5)
        mark.touch()

    if read_launch().rank == 1:
        dist.init_process_group = slow_connect
    group = join()
    seen = mark.exists()
    group.barrier()
    group.close()
    return seen


def test_no_rank_has_a_group_before_all_are_connected(tmp_path: Path) -> None:
    """Otherwise a rank that fails at once breaks another connection, and the first cause is a closed connection."""
    assert run_world(3, join_late, tmp_path / "connected") == [True] * 3


def outlive_the_store() -> Any:
    group = join()
    keeper = group.gather_all(os.getpid())[0]
    if group.rank == 0:
        return None  # exits silently, and the store ends with it
    wait_until(lambda: not Path(f"/proc/{keeper}").exists(), "rank 0 is gone")
    found = group.first_failure(), group.report_failure("1:RuntimeError: Connection closed by peer")
    try:
        group.barrier()
    except RuntimeError as error:
        return *found, type(error).__name__
    return *found, "no error"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc to see a process end")
def test_a_rank_that_outlives_the_store_exits_alone() -> None:
    found = run_world(2, outlive_the_store, timeout_s=2 * PATIENCE_S)[1]
    assert found[:2] == (None, True), "nobody else can say what came first"
    assert found[2] != "no error"


# ---------------------------------------------------------------------- every wait has a time limit


def wait_for_one_that_does_not_come() -> Any:
    group = join(timeout_s=5.0)  # also for the two to meet
    if group.rank == 1:
        return wait_until(group.first_failure, "rank 0 has given up")
    started = time.monotonic()
    try:
        group.barrier()
    except RuntimeError as error:
        waited = time.monotonic() - started
        group.report_failure("gave up")
        return waited, str(error)
    finally:
        group.close()
    return "no error"


def test_a_collective_that_one_rank_never_joins_ends_after_the_stated_time() -> None:
    (waited, said), told = run_world(2, wait_for_one_that_does_not_come, timeout_s=2 * PATIENCE_S)
    assert waited >= 4.9, "not before the five seconds"
    assert "imed out" in said
    assert told == (0, "gave up")


@pytest.mark.parametrize(("rank", "said"), [(0, "1/2 clients joined"), (1, "timed out")])
def test_a_world_that_does_not_gather_is_a_launch_error(
    rank: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with pytest.raises(LaunchError) as refused:
        Group(Launch("srun", rank, rank, 2, 2, "127.0.0.1", port), CPU, timeout_s=1.0)
    message = str(refused.value)
    assert message.startswith(f"2 process(es) did not all connect at 127.0.0.1:{port} within 1 s (run.timeout_s).\n")
    assert said in message
    assert "fix: start them all" in message
    assert not dist.is_initialized()
    capfd.readouterr()  # torch writes its stack trace


# ---------------------------------------------------------------------- a world of one


def test_a_world_of_one_is_a_real_world() -> None:
    group = Group(Launch("plain python", 0, 0, 1, 1), CPU, timeout_s=5)
    try:
        assert (dist.get_backend(), dist.get_world_size(), dist.get_rank()) == ("gloo", 1, 0)
        tensor = torch.tensor([3.0])
        dist.all_reduce(tensor)
        assert tensor.tolist() == [3.0]
        assert group.gather("a") == group.gather_all("a") == ["a"]
        assert (group.broadcast("b"), group.minimum(4)) == ("b", 4)
        group.barrier()
        group.agree(None, "nothing")
        with pytest.raises(DataError, match="torn"):
            group.agree(DataError("torn"), "reading")
        assert group.first_failure() is None
        assert group.report_failure("4:torn")
        assert group.first_failure() == (0, "4:torn")
        assert not group.report_failure("1:later")
    finally:
        group.close()
    assert not dist.is_initialized()
    assert group.first_failure() == (0, "4:torn"), "what ends the process may still ask"


def test_a_group_of_an_open_engine_is_not_shared() -> None:
    alone = Launch("plain python", 0, 0, 1, 1)
    group = Group(alone, CPU, timeout_s=5)
    try:
        with pytest.raises(LaunchError, match=r"(?s)still uses the process group \(1 rank\(s\)\).*close the earlier"):
            Group(alone, CPU, timeout_s=5)
        assert group.gather_all(1) == [1], "and goes on"
    finally:
        group.close()


# ---------------------------------------------------------------------- the process's end

ENDINGS = """
import gc, os, sys
import torch, torch.distributed as dist
from disttrain.runtime import Group, Launch, choose_device

def work():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, and Python is not given away unasked:
    sys.setswitchinterval(1000)  # the other threads get on where this one waits, and only there
    alone = Launch("plain python", 0, 0, 1, 1)
    group = Group(alone, choose_device("cpu", alone), timeout_s=30)
    kept.append(dist.group.WORLD)  # as a mesh or a sharded model does
    for _ in range(1000):
        tensor = torch.ones(4)
        work = dist.all_reduce(tensor, async_op=True)
        del tensor  # gloo's thread is left with it, and needs Python to let go
        work.wait()
    group.close()

kept, codes = [], []
gc.freeze()  # otherwise each child traverses torch's objects when it ends, which takes a second
for _ in range(30):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)  # the interpreter ends as every script's does
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""


def test_a_process_that_closed_its_group_exits_well_despite_remaining_references() -> None:
    """Without the wait for gloo's threads some of these processes die of SIGABRT at exit."""
    ran = subprocess.run([sys.executable, "-c", ENDINGS], capture_output=True, text=True, timeout=PATIENCE_S)
    assert ran.stdout.strip() == str([0] * 30), ran.stdout + ran.stderr[-2000:]


# ---------------------------------------------------------------------- a group that exists already


def use_existing_group() -> Any:
    rank, size, port = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_PORT"]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    launch = launch_of_existing_group(read_launch())
    found["launch"] = (launch.launcher, launch.rank, launch.local_rank, launch.world_size, launch.local_world_size)
    for attempt in ("first", "second"):
        group = Group(launch, CPU, timeout_s=PATIENCE_S)
        found[attempt] = group.gather_all(rank), group.background().gather(rank)
        group.close()
        found[f"open after {attempt}"] = dist.is_initialized()
    group = Group(launch, CPU, timeout_s=PATIENCE_S)
    if rank == 1:
        group.report_failure("4:DataError: torn")
    found["failure"] = wait_until(group.first_failure, "rank 1 has reported")
    group.close()
    wrong_size = outcome(lambda: Group(Launch("torchrun", rank, rank, 3, 3, "127.0.0.1", 1), CPU, timeout_s=5))
    found["wrong size"] = wrong_size[0], wrong_size[1].split("\n")[1].strip(), wrong_size[2]
    numbers = torch.tensor(rank + 1)
    dist.all_reduce(numbers)
    found["still usable"] = int(numbers)
    dist.destroy_process_group()
    return found


def test_an_existing_group_is_used_and_left_open() -> None:
    for rank, found in enumerate(run_world(2, use_existing_group)):
        assert found == {
            "launch": ("process group", rank, rank, 2, 2),
            "first": ([0, 1], [0, 1] if rank == 0 else None),
            "second": ([0, 1], [0, 1] if rank == 0 else None),
            "open after first": True,
            "open after second": True,
            "failure": (1, "4:DataError: torn"),
            "wrong size": (
                "LaunchError",
                f"problem: it has rank {rank} of 2, and torchrun says rank {rank} of 3",
                LaunchError.exit_code,
            ),
            "still usable": 3,
        }


@pytest.mark.parametrize("backend", ["fake", "cuda:gloo"])
def test_an_existing_group_of_another_backend_is_rejected(backend: str) -> None:
    import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend "fake"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LaunchError, match=r"(?s)Cannot use the existing process group on cpu.*without cpu:gloo"):
            Group(Launch("plain python", 0, 0, 1, 1), CPU, timeout_s=5)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_repeated_groups_prefix_a_traceback_once() -> None:
    code = (
        "from disttrain.runtime import Group, Launch, choose_device\n"
        "alone = Launch('plain python', 0, 0, 1, 1)\n"
        "for _ in range(3):\n"
        "    Group(alone, choose_device('cpu', alone), timeout_s=5).close()\n"
        "raise ValueError('once')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stderr.splitlines()[-1] == "[rank0]: ValueError: once", done.stderr
