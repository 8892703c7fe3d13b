"""Failures in a world of two: every rank exits long before run.timeout_s, and the first cause is reported once.

Committed checkpoints stay loadable, and the same command continues from them once the cause is fixed.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from launched import PROJECT, column, launch, status, user_environment
from world import WorldError, run_world

import disttrain

YAML = """
version: 1
run:       {name: mine, dir: runs, seed: 1, steps: 6, device: cpu}
model:     {target: "troubles:Line"}
objective: {target: "troubles:squares"}
data:      {train: {target: "troubles:points"}, global_batch: 8, micro_batch: 2}
optim:     {target: torch.optim.SGD, args: {lr: 0.05}}
checkpoint: {every: 2}
report:    {every: 1, progress: false, plot: false}
"""
PATIENCE_S = 120.0
"""For a whole world on two busy cores; a rank that hung once another had failed would stay run.timeout_s, 1800."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(PROJECT / "tests" / "models" / "troubles.py", tmp_path)
    (tmp_path / "mine.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


def train(overrides: list[str]) -> int:
    """Run `disttrain.run` as one rank. Its output goes to a file, unbuffered."""
    rank = os.environ["RANK"]
    descriptor = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from disttrain.run import main

    return main(["mine.yaml", *overrides])


def run(*overrides: str, size: int = 2) -> list[Ended]:
    found = run_world(size, train, list(overrides), timeout_s=PATIENCE_S)
    return [Ended(code, Path(f"said-{rank}").read_text()) for rank, code in enumerate(found)]


def first_cause(ends: list[Ended], code: int, *words: str) -> str:
    """All ranks ended with `code` in time. Exactly one reported the cause, in words a person can use."""
    assert [one.code for one in ends] == [code] * len(ends), [one.said for one in ends]
    told = [one.said for one in ends if all(word in one.said for word in words)]
    assert told, [one.said for one in ends]
    if len(told) > 1:  # before the group exists, or if every rank detects the same error alone
        assert all("Traceback" not in one.said for one in ends)
    return told[0]


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["data.train.args.size=0"], 4, ["TensorDataset is empty", "fix:"]),
        (["data.train.args.size=5"], 4, ["data.global_batch=8", "TensorDataset has 5", "lower data.global_batch"]),
        (["data.global_batch=1", "data.micro_batch=1"], 2, ["data.global_batch=1", "of 2 ranks", "fix:"]),
        (["data.train.target=troubles:Odd"], 4, ["item 17", "(4,)", "(3,)", "data.collate"]),
        (["data.train.target=troubles:Unreadable"], 1, ["/nowhere/17.png", "while fetching index 17 of Unreadable"]),
        (["objective.target=troubles:Raises"], 1, ["BoomError: the user's own words"]),
        (["objective.target=troubles:NotFinite"], 6, ["finite", "nan", "The weights are unchanged"]),
        (["objective.target=troubles:Steep", "optim.clip_norm=1"], 6, ["finite", "gradient norm", "fix:"]),
        (["objective.target=troubles:below_zero"], 6, ["-6.0", "not negative"]),
        (["objective.target=troubles:Exits"], 1, ["SystemExit"]),
        (["model.args.inputs=4"], 1, ["mat1 and mat2 shapes"]),
        (["model.target=troubles:other_weights"], 2, ["weights on different ranks", "rank 1 differs", "line.weight"]),
        (["model.target=troubles:other_frozen"], 2, ["weights on different ranks", "whether 'line.bias' is frozen"]),
        (["strategy.name=none"], 2, ["strategy none", "2 processes", "ddp"]),
        (["model.weights=runs/nowhere"], 5, ["runs/nowhere", "no such folder"]),
        (["checkpoint.resume=runs/nowhere"], 5, ["runs/nowhere", "no such folder"]),
        (["data.train.target=troubles:squares"], 2, ["squares", "args"]),
    ],
)
def test_each_ends_with_its_code_and_its_cause(overrides: list[str], code: int, words: list[str]) -> None:
    first_cause(run(*overrides), code, *words)
    if code == 2 and "troubles:other_" not in overrides[0]:
        assert not Path("runs").exists(), "refused before anything was made"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
@pytest.mark.parametrize("trouble", ["Raises", "NotFinite"])
def test_committed_checkpoints_stay_and_the_run_continues(strategy: str, trouble: str) -> None:
    other = f"objective.target=troubles:{trouble}"
    code, word = {"Raises": (1, "BoomError"), "NotFinite": (6, "finite")}[trouble]
    first_cause(run(other, f"strategy.name={strategy}"), code, word)
    assert status(Path("runs/mine"))["state"] == "failed"
    assert status(Path("runs/mine"))["exit_code"] == code
    assert sorted(column(Path("runs/mine"), "loss")) == [1, 2]
    assert disttrain.load("runs/mine").line.weight.shape == (1, 3)
    sys.modules.pop("troubles")
    text = Path("troubles.py").read_text()  # the user fixes the code and runs the same line
    Path("troubles.py").write_text(text.replace("step == 3", "step == -1"))
    assert [one.code for one in run(other, f"strategy.name={strategy}")] == [0, 0]
    assert sorted(column(Path("runs/mine"), "loss")) == [1, 2, 3, 4, 5, 6]


def test_a_rank_that_exits_silently_ends_the_other() -> None:
    with pytest.raises(WorldError, match=r"no result from rank\(s\) 1 "):
        run("objective.target=troubles:Leaves")
    said = Path("said-0").read_text()
    assert "error (exit 3)" in said and "ended without an error message" in said
    assert "run the same command again" in said
    assert status(Path("runs/mine"))["state"] == "failed"


def test_a_folder_that_holds_another_run_is_unchanged() -> None:
    assert [one.code for one in run()] == [0, 0]
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    told = first_cause(
        run("run.seed=2", "model.args.inputs=5", "run.steps=9"), 5, "another run", "run.seed: 1 there, 2"
    )
    assert "model.args" in told and "run.name" in told and "run.steps" not in told
    first_cause(run("checkpoint.resume=never"), 5, "holds a run already", "run.name")
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_settings_that_may_differ_after_a_resume_do() -> None:
    assert [one.code for one in run()] == [0, 0]
    changed = ["run.steps=9", "data.micro_batch=1", "data.workers=1", "report.every=3", "strategy.name=fsdp"]
    ends = run(*changed, size=3)
    assert [one.code for one in ends] == [0, 0, 0], ends
    assert sorted(column(Path("runs/mine"), "loss")) == [1, 2, 3, 4, 5, 6, 9]


@pytest.mark.parametrize("damage", ["config", "status", "manifest", "tensors"])
def test_a_damaged_folder_is_named_or_the_run_continues_from_intact_checkpoints(damage: str) -> None:
    assert [one.code for one in run("run.steps=4")] == [0, 0]
    mine = Path("runs/mine")
    newest = mine / "checkpoints" / "step-00000004"
    if damage in ("config", "status"):
        file = mine / {"config": "config.yaml", "status": "status.json"}[damage]
        file.write_text("{")
        first_cause(run(), 5, file.name, "fix:")
        return
    file = newest / "manifest.json" if damage == "manifest" else next(newest.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    ends = run()
    assert [one.code for one in ends] == [0, 0]
    assert "step-00000004 is damaged and was set aside" in ends[0].said
    assert "continues at step 2" in ends[0].said
    assert (mine / "checkpoints" / "rejected-step-00000004-1").is_dir()


def test_a_full_disk_while_saving_keeps_what_was_committed(small_disk: Path) -> None:
    where = f"run.dir={small_disk}"
    assert [one.code for one in run(where, "run.steps=2")] == [0, 0]
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()
    told = first_cause(run(where), 5, "No space left on device")
    assert "fix:" in told
    filler.unlink()
    assert disttrain.load(small_disk / "mine").line.weight.shape == (1, 3)
    assert [one.code for one in run(where)] == [0, 0]
    assert sorted(column(small_disk / "mine", "loss")) == [1, 2, 3, 4, 5, 6]


def test_under_torchrun_the_user_reads_the_first_cause(folder: Path) -> None:
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "disttrain.run", "mine.yaml")
    environment = user_environment(PYTHONPATH=str(PROJECT))
    done = launch(
        sys.executable,
        *agent,
        "objective.target=troubles:Raises",
        timeout_s=PATIENCE_S,
        cwd=folder,
        environment=environment,
        expect=1,
    )
    assert done.stderr.count("BoomError: the user's own words") == 1
    assert status(folder / "runs" / "mine")["exit_code"] == 1
    assert "Boom" in status(folder / "runs" / "mine")["reason"]
