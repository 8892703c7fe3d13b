"""Nothing is lost by SIGKILL of one rank: the same command continues with the numbers of an uninterrupted run.

Results are bit-equal on one and two ranks. From three ranks on, DDP rebuilds its buckets in the order in which
gradients arrived in the first backward of a process. After a resume that is the backward of another step, and the ring
sums other neighbours first, so the bound is 1e-6 relative. FSDP2, ZeRO and `ddp` on a small model sum in an order that
depends on shapes only and stay bit-equal.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from contract.engine_runs import STRATEGIES
from launched import PROJECT, launch, metrics, status, user_environment
from world import WorldError, run_world

STEPS, EVERY = 12, 4

YAML = """
version: 1
run:       {name: mortal, dir: runs, seed: 3, steps: 12, device: cpu}
model:     {target: gpt, args: {layers: 2, width: 32, heads: 4, kv_heads: 2, context: 16, vocab: 256, dropout: 0.1}}
objective: {target: "killer:Mortal", args: {folder: runs/mortal}}
data:
  train:   {target: byte_text, args: {source: text, context: 16}}
  global_batch: 32
  micro_batch: 4
eval:
  every: 4
  micro_batch: 64
  sets:    {held_out: {target: byte_text, args: {source: text, context: 16, split: eval}}}
optim:     {target: torch.optim.AdamW, args: {lr: 3.0e-3, weight_decay: 0.1}, clip_norm: 1.0}
schedule:  {target: cosine, args: {warmup: 4}}
checkpoint: {every: 4, keep_last: 2}
report:    {every: 1, progress: false, plot: false}
"""

COMPARED = ("loss", "lr", "grad_norm", "samples", "tokens", "eval/held_out/loss", "bits_per_byte")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with config, objective and text, and the working directory."""
    return make_folder(tmp_path, monkeypatch)


def make_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.mkdir(exist_ok=True)
    shutil.copy(PROJECT / "tests" / "models" / "killer.py", path)
    (path / "mortal.yaml").write_text(YAML)
    shutil.copy(PROJECT / "LICENSE", path / "text")
    monkeypatch.chdir(path)
    return path


def train(overrides: list[str], kill: str | None = None) -> int:
    """Run `disttrain.run` as one rank, in the caller's working directory."""
    if kill is not None:
        os.environ["KILL"] = kill
    from disttrain.run import main

    return main(["mortal.yaml", *overrides])


def numbers(run: Path) -> list[dict[str, Any]]:
    """The numbers that must not change, line by line of the metrics."""
    return [{key: line[key] for key in ("step", *COMPARED) if key in line} for line in metrics(run)]


def uninterrupted(size: int, overrides: list[str]) -> list[dict[str, Any]]:
    assert run_world(size, train, overrides) == [0] * size
    found = numbers(Path("runs/mortal"))
    shutil.rmtree("runs")
    return found


def killed(size: int, overrides: list[str], kill: str) -> None:
    with pytest.raises(WorldError, match="no result from rank"):
        run_world(size, train, overrides, kill)


KILLS = ["1:2:forward", "0:7:forward", "0:8:saving", "1:4:saving"]


@pytest.mark.parametrize(
    "name", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero2", "zero3"))]
)
def test_continues_bit_equal_on_two_ranks(name: str, folder: Path) -> None:
    overrides = STRATEGIES[name]
    expected = uninterrupted(2, overrides)
    assert [line["step"] for line in expected] == sorted([*range(1, STEPS + 1), *range(EVERY, STEPS + 1, EVERY)])
    for kill in KILLS if name == "ddp" else KILLS[1:3]:
        killed(2, overrides, kill)
        assert run_world(2, train, overrides) == [0, 0], kill
        assert numbers(Path("runs/mortal")) == expected, kill
        assert status(Path("runs/mortal"))["state"] == "finished"
        shutil.rmtree("runs")


def test_continues_bit_equal_on_one_rank(folder: Path) -> None:
    expected = uninterrupted(1, ["strategy.name=none"])
    for kill in ("0:1:forward", "0:6:forward", "0:8:saving"):
        killed(1, ["strategy.name=none"], kill)
        assert run_world(1, train, ["strategy.name=none"]) == [0]
        assert numbers(Path("runs/mortal")) == expected, kill
        shutil.rmtree("runs")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("ddp-buckets", "ddp", "fsdp", "zero3")]
)
def test_continues_on_three_ranks(name: str, folder: Path) -> None:
    overrides = STRATEGIES[name]
    expected = uninterrupted(3, overrides)
    killed(3, overrides, "2:10:forward")
    assert run_world(3, train, overrides) == [0, 0, 0]
    found = numbers(Path("runs/mortal"))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == (pytest.approx(theirs, rel=1e-6) if name == "ddp-buckets" else theirs)


SEGMENTS = {
    "fp32": [(2, "ddp", "0:6"), (3, "fsdp", "2:10"), (2, "zero2", "1:14"), (3, "zero3", "0:18"), (1, "none", None)],
    "fp64": [(2, "ddp", "0:6"), (3, "fsdp", "2:10"), (4, "ddp", "1:14"), (2, "fsdp", "0:18"), (1, "none", None)],
}


@pytest.mark.parametrize("compute", ["fp32", pytest.param("fp64", marks=pytest.mark.slow)])
def test_continues_under_other_strategies_at_other_sizes(compute: str, folder: Path) -> None:
    """Each segment is killed a few steps after its checkpoint. The next segment continues from there."""
    common = ["run.steps=20", f"precision.compute={compute}"]
    expected = uninterrupted(1, ["strategy.name=none", *common])
    for size, name, kill in SEGMENTS[compute]:
        overrides = [*STRATEGIES[name], *common]
        if kill is not None:
            killed(size, overrides, f"{kill}:forward")
        else:
            assert run_world(size, train, overrides) == [0] * size
    found = numbers(Path("runs/mortal"))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    # The order of float32 sums differs: 1e-5 for losses, and ten times that for a gradient's norm, which AdamW's first
    # steps amplify. In float64 only rounding is left of both.
    for mine, theirs in zip(found, expected, strict=True):
        norms = {"grad_norm": mine.pop("grad_norm", 0.0)}, {"grad_norm": theirs.pop("grad_norm", 0.0)}
        assert mine == pytest.approx(theirs, rel=1e-5 if compute == "fp32" else 1e-9)
        assert norms[0] == pytest.approx(norms[1], rel=1e-4 if compute == "fp32" else 1e-9)
    ledger = [json.loads(line) for line in Path("runs/mortal/ledger.jsonl").read_text().splitlines()]
    began = [(one["step"], one["world_size"], one["strategy"]) for one in ledger if one["event"] == "segment"]
    names = [STRATEGIES[name][0].removeprefix("strategy.name=") for _, name, _ in SEGMENTS[compute]]
    sizes = [size for size, _, _ in SEGMENTS[compute]]
    assert began == list(zip(range(0, 20, 4), sizes, names, strict=True))


def test_the_same_torchrun_command_again(folder: Path) -> None:
    """As a user does it: real agents, a real kill, and the same command line."""
    expected = uninterrupted(2, [])
    command = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "disttrain.run",
        "mortal.yaml",
    )
    environment = user_environment(PYTHONPATH=str(PROJECT))
    python = shutil.which("python", path=environment["PATH"]) or "python"
    kill = {**environment, "KILL": "1:7:forward"}
    failed = launch(python, *command, timeout_s=240, cwd=folder, environment=kill, expect=1)
    assert f"-{signal.SIGKILL.value}" in failed.stderr
    again = launch(python, *command, timeout_s=240, cwd=folder, environment=environment)
    assert "continues at step 4" in again.stderr
    assert numbers(folder / "runs" / "mortal") == expected
    assert run_world(2, train, []) == [0, 0], "a finished run is left as it is"
    assert numbers(folder / "runs" / "mortal") == expected
