"""Checkpoints in S3, over HTTP to moto's server: multipart uploads, ranges, and the errors of a bucket."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from world import run_world

from disttrain.checkpoint import (
    Address,
    Box,
    Checkpoint,
    Shard,
    SoleRank,
    full_shard,
    list_checkpoints,
    newest_intact,
    prune,
    reject_unwritable,
    remove_stale_staging,
    save_checkpoint,
    set_aside,
)
from disttrain.errors import CheckpointError, ConfigError

s3fs = pytest.importorskip("s3fs", reason="needs pip install 'disttrain[s3]'")
moto_server = pytest.importorskip("moto.server", reason="needs pip install 'disttrain[dev]'")

ROOT = Address("s3://models/team/run")
W, V = "model/m/w", "optim/m/w:exp_avg"
MIB = 2**20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server for this module, and its address."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Any]:
    """The driver, on a server with one empty bucket. The environment says how to reach it."""
    reach(endpoint)
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST"))
    system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    system.mkdir("models")
    yield system


def reach(endpoint: str, key: str = "anybody") -> None:
    """Sets the environment as a user would, because no config names the server."""
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1"
    )
    s3fs.S3FileSystem.clear_instance_cache()


def state(rank: int, size: int) -> dict[str, Any]:
    """The shards of a rank: rows of a 36 MiB tensor, and one tensor that all ranks hold."""
    whole = torch.arange(9 * MIB, dtype=torch.int32).view(torch.float32).view(9, -1)
    per = -(-9 // size)
    box = Box((rank * per, 0), (min(per, 9 - rank * per), MIB))
    return {"part": Shard(W, (9, MIB), box, whole[box.slices()].clone()), "whole": torch.arange(1000.0)}


def save_part(endpoint: str, step: int) -> str:
    from disttrain.runtime import Group, choose_device, read_launch

    reach(endpoint)
    launch = read_launch()
    group = Group(launch, choose_device("cpu", launch, 1), timeout_s=60.0)
    try:
        mine = state(group.rank, group.size)
        shards = [mine["part"], full_shard(V, mine["whole"], (group.rank, group.size))]
        return str(save_checkpoint(ROOT, step, shards, {"step": step}, group))
    finally:
        group.close()


def load_part(endpoint: str) -> tuple[int, list[bool]]:
    from disttrain.runtime import Group, choose_device, read_launch

    reach(endpoint)
    launch = read_launch()
    group = Group(launch, choose_device("cpu", launch, 1), timeout_s=60.0)
    try:
        found, rejected = newest_intact(ROOT, group)
        assert found is not None, rejected
        mine = state(group.rank, group.size)
        part = mine["part"]
        into, other = torch.zeros(part.box.sizes), torch.zeros(1000)
        found.load_into([Shard(W, (9, MIB), part.box, into), full_shard(V, other)])
        same = [torch.equal(into.view(torch.int32), part.tensor.view(torch.int32)), torch.equal(other, mine["whole"])]
        return found.step, same
    finally:
        group.close()


def save(step: int, value: float = 1.0) -> Address:
    return save_checkpoint(ROOT, step, [full_shard(W, torch.full((1500,), value))], {}, SoleRank(), chunk_bytes=4096)


def test_saved_in_parts_by_two_ranks_and_loaded_bit_equal_by_three(endpoint: str, bucket: Any) -> None:
    assert run_world(2, save_part, endpoint, 100) == ["s3://models/team/run/step-00000100"] * 2
    names = [entry["name"].rsplit("/", 1)[-1] for entry in bucket.ls("models/team/run/step-00000100", detail=True)]
    assert sorted(names) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):  # 20 and 16 MiB and a header
        etag = bucket.info(f"models/team/run/step-00000100/{name}")["ETag"].strip('"')
        assert etag.endswith("-2"), "an ETag of a file that came in parts ends with their number"
    assert run_world(3, load_part, endpoint) == [(100, [True, True])] * 3


KILLED = """
import os, signal, sys
import torch
from disttrain.checkpoint import Address, Disk, SoleRank, save_checkpoint, full_shard
state = [full_shard("model/m/w", torch.ones(10 * 2**20))]
for number, (operation, name, count) in enumerate([
    ("write", "rank-00000.safetensors", 5), ("sync", "rank-00000.safetensors", 1),
    ("create", "manifest.json", 1), ("write", "manifest.json", 1), ("sync", "manifest.json", 1), ("never", "", 1),
]):
    pid = os.fork()
    if pid == 0:
        left = count
        def before(done, place):
            global left
            left -= (done, place.name) == (operation, name)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        root = Address(f"s3://models/killed/{number}")
        save_checkpoint(root, 200, state, {}, SoleRank(), disk=Disk(before), chunk_bytes=4 * 2**20)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_killed_writer_leaves_no_checkpoint_and_the_previous_one_loads(bucket: Any) -> None:
    for number in range(6):
        root = Address(f"s3://models/killed/{number}")
        save_checkpoint(root, 100, [full_shard(W, torch.zeros(10))], {}, SoleRank())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED], env=env, timeout=200, capture_output=True, text=True)
    assert done.stdout.split() == ["-9"] * 5 + ["0"], done.stderr
    for number in range(6):
        root = Address(f"s3://models/killed/{number}")
        checkpoint, rejected = newest_intact(root, SoleRank())
        assert checkpoint is not None
        assert (checkpoint.step, rejected) == (100 if number < 5 else 200, [])
        # The first writer was killed before its file was complete and left none. The files of the others are removed,
        # the commits stay.
        removed = [root / "step-00000200"] if number in (2, 3, 4) else []
        assert remove_stale_staging(root) == removed
        assert [path.name for path in list_checkpoints(root)] == ["step-00000100", "step-00000200"][: 1 + number // 5]
        assert len(bucket.find(f"models/killed/{number}")) == 2 * (1 + number // 5)


def test_a_save_that_fails_in_the_middle_of_an_upload_leaves_nothing(bucket: Any) -> None:
    from disttrain.checkpoint import Disk

    def before(operation: str, place: Address) -> None:
        if operation == "sync":
            raise OSError(5, "Input/output error", str(place))

    state = [full_shard(W, torch.ones(10 * MIB))]
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(ROOT, 100, state, {}, SoleRank(), disk=Disk(before), chunk_bytes=4 * MIB)
    assert bucket.find("models") == []
    assert bucket.list_multipart_uploads("models") == []
    assert save_checkpoint(ROOT, 100, state, {}, SoleRank()) == ROOT / "step-00000100"


def test_damage_on_the_server_is_detected_and_the_previous_checkpoint_is_used(bucket: Any) -> None:
    for step in (100, 200, 300, 400):
        save(step, float(step))
    for step, name, place in ((400, "rank-00000.safetensors", -1), (300, "manifest.json", 200)):
        key = f"models/team/run/step-{step:08d}/{name}"
        rotten = bytearray(bucket.cat_file(key))
        rotten[place] ^= 1
        bucket.pipe_file(key, bytes(rotten))
    key = "models/team/run/step-00000200/rank-00000.safetensors"
    bucket.pipe_file(key, bucket.cat_file(key)[:-1])
    found, rejected = newest_intact(ROOT, SoleRank())
    assert found is not None
    assert torch.equal(found.read(W), torch.full((1500,), 100.0))
    reasons = [reason for _, reason in rejected]
    assert "rank-00000.safetensors, bytes 4096 to" in reasons[0]
    assert "does not match" in reasons[1] or "do not match" in reasons[1]
    assert "bytes instead of" in reasons[2]
    with pytest.raises(CheckpointError, match="checksum"):
        Checkpoint.open(ROOT / "step-00000400").read(W)
    aside = set_aside(ROOT / "step-00000400")
    assert bucket.ls(str(aside)) == [f"models/team/run/{aside.name}/{name}" for name in ("manifest.json", key[-22:])]
    assert save(400) == ROOT / "step-00000400"


def test_pruning_removes_every_key_of_old_checkpoints(bucket: Any) -> None:
    paths = [save(step) for step in (1, 2, 3, 4)]
    assert prune(ROOT, 2, protect=[paths[0]]) == [paths[1]]
    assert list_checkpoints(ROOT) == [paths[0], *paths[2:]]
    assert len(bucket.find("models")) == 6


def test_a_missing_bucket_is_named(bucket: Any) -> None:
    root = Address("s3://nowhere/run")
    with pytest.raises(CheckpointError, match=r"s3://nowhere/run[^\n]*\n.*bucket does not exist"):
        reject_unwritable(root)
    with pytest.raises(CheckpointError, match=r"(?s)of step \d+ to s3://nowhere/run.*bucket does not exist"):
        save_checkpoint(root, 1, [full_shard(W, torch.ones(3))], {}, SoleRank())
    assert newest_intact(root, SoleRank()) == (None, [])
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(root / "step-00000001")


def check_keys(endpoint: str, after: bytes) -> None:
    """Make the server accept the next few requests without permission, and reject later ones."""
    url, headers = f"{endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urlopen(Request(url, data=after, headers=headers, method="POST"))


def test_credentials_without_permission_are_named(endpoint: str, bucket: Any) -> None:
    path = save(100)
    check_keys(endpoint, b"0")
    try:
        with pytest.raises(CheckpointError, match=r"(?s)checkpoints at s3://models/team/run.*Access Key.*fix: "):
            reject_unwritable(ROOT)
        for act in (
            lambda: save(200),
            lambda: newest_intact(ROOT, SoleRank()),
            lambda: Checkpoint.open(path),
            lambda: list_checkpoints(ROOT),
        ):
            with pytest.raises(
                CheckpointError, match=r"s3://models/team/run(?s:.*)Access Key Id you provided does not exist"
            ):
                act()
    finally:
        check_keys(endpoint, b"inf")


def test_an_unreachable_server_is_named(bucket: Any) -> None:
    reach("http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"(?s)s3://models/team/run.*127.0.0.1:9"):
        save(100)


YAML = """
version: 1
run:       {name: afar, dir: runs, seed: 3, steps: 8, device: cpu}
model:     {target: gpt, args: {layers: 1, width: 16, heads: 2, context: 16, vocab: 256}}
objective: {target: next_token}
data:
  train:   {target: byte_text, args: {source: text, context: 16}}
  global_batch: 8
  micro_batch: 4
optim:     {target: torch.optim.AdamW, args: {lr: 3.0e-3}}
checkpoint: {every: 2, keep_last: 2, background: true}
report:    {every: 1, progress: false, plot: false}
"""


def train(endpoint: str, folder: str, overrides: list[str]) -> int:
    from disttrain.run import main

    reach(endpoint)
    os.chdir(folder)
    return main(["afar.yaml", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "afar.yaml").write_text(YAML)
    shutil.copy(Path(__file__).parents[2] / "LICENSE", tmp_path / "text")
    return tmp_path


def losses(folder: Path, name: str = "afar") -> dict[int, float]:
    import json

    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def test_a_run_continues_from_the_store_alone_with_the_numbers_of_an_uninterrupted_run(
    endpoint: str, bucket: Any, folder: Path
) -> None:
    import disttrain

    assert run_world(2, train, endpoint, str(folder), ["run.name=whole"]) == [0, 0]
    stored = ["checkpoint.storage=s3://models/team", "strategy.name=fsdp"]
    assert run_world(2, train, endpoint, str(folder), [*stored, "run.steps=5"]) == [0, 0]
    assert [path.name for path in list_checkpoints(Address("s3://models/team/afar"))] == [
        "step-00000004",
        "step-00000005",
    ]
    assert not (folder / "runs" / "afar" / "checkpoints").exists()
    shutil.rmtree(folder / "runs" / "afar")  # as if the node's disk were lost
    assert run_world(2, train, endpoint, str(folder), stored) == [0, 0]
    ours, theirs = losses(folder), losses(folder, "whole")
    assert list(ours) == [6, 7, 8]
    # ddp in addition to fsdp: sums in fp32
    assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=1e-6)

    # Read by address, by checkpoint, and by the run's folder, whose config names the store.
    weights = [
        disttrain.load(where).state_dict()
        for where in ("s3://models/team/afar", "s3://models/team/afar/step-00000008", folder / "runs" / "afar")
    ]
    for other in weights[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in weights[0].items())
    there = "s3://models/team/afar"
    start = ["run.name=next", f"model.weights={there}", f"checkpoint.resume={there}", "run.steps=9"]
    assert run_world(1, train, endpoint, str(folder), start) == [0]
    assert list(losses(folder, "next")) == [9]
    assert run_world(1, train, endpoint, str(folder), ["run.steps=9"]) == [5]  # its folder has no checkpoints
    assert list(losses(folder)) == [6, 7, 8]
    never = [*stored, "checkpoint.resume=never", "run.dir=elsewhere"]
    assert run_world(1, train, endpoint, str(folder), never) == [5]


def test_the_commands_read_and_prune_a_bucket(bucket: Any) -> None:
    """With the console program in separate processes, which know the server only from their environment."""
    for step in (1, 2, 3):
        save(step)
    damaged = "models/team/run/step-00000003/rank-00000.safetensors"
    bucket.pipe_file(damaged, bucket.cat_file(damaged)[:-1] + b"!")

    def ckpt(*words: str) -> tuple[int, Any]:
        command = [sys.executable, "-m", "disttrain.cli", "ckpt", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    code, found = ckpt("ls", str(ROOT))
    assert code == 0 and [(one["step"], one["intact"]) for one in found["checkpoints"]] == [(1, 1), (2, 1), (3, 1)]
    assert all(one["when"].endswith("+00:00") and one["bytes"] > 6000 for one in found["checkpoints"])
    code, found = ckpt("verify", str(ROOT))
    assert code == 5 and [one["intact"] for one in found["checkpoints"]] == [True, True, False]
    assert "rank-00000.safetensors, bytes 4096 to" in found["checkpoints"][2]["faults"][0]
    code, found = ckpt("diff", f"{ROOT}/step-00000001", f"{ROOT}/step-00000002")
    assert code == 1 and not found["differences"] and [one["key"] for one in found["state"]] == ["step"]
    code, found = ckpt("prune", str(ROOT), "--keep-last", "1")
    assert (found["kept"], found["removed"]) == (["step-00000002"], ["step-00000001"])
    assert [one["name"] for one in found["damaged"]] == ["step-00000003"], "damaged: neither counted nor removed"
    assert {key.split("/")[3] for key in bucket.find("models/team/run")} == {"step-00000002", "step-00000003"}


def test_an_unusable_store_ends_a_run_before_its_first_step(
    endpoint: str, bucket: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disttrain.config import load_config
    from disttrain.engine.build import plan_run

    monkeypatch.chdir(folder)
    for storage, found in {
        "s4://models": "Protocol not known",
        "s3:/models": "s3://models",
        "s3://": "does not name a bucket",
    }.items():
        with pytest.raises(ConfigError, match=found):
            plan_run(load_config("afar.yaml", [f"checkpoint.storage={storage}"]))
    assert run_world(1, train, endpoint, str(folder), ["checkpoint.storage=s3://nowhere"]) == [5]
    assert not (folder / "runs" / "afar" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_memory_is_bounded_by_parts_and_chunks_not_by_the_state() -> None:
    """With a small benchmark: six parts of 16 MiB. A save holds at most three of them, a load one."""
    script = Path(__file__).parents[2] / "benchmarks" / "checkpoint_storage.py"
    done = subprocess.run(
        [sys.executable, str(script), "--mib", "96", "--rounds", "1"], timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cells = [row.split("|")[1:4] for row in done.stdout.splitlines()[2:]]
    above = {name.strip(): float(mib) for name, _, mib in cells}
    assert list(above) == ["plain put", "save", "plain get", "resume", "load"]
    assert above["save"] < 72, above
    assert max(above["resume"], above["load"]) < 40, above
