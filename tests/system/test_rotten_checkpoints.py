"""A run whose newest checkpoint is damaged, truncated, swapped or hostile resumes from the previous one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, metrics
from world import run_world

SAVED, STEPS = (2, 4, 6), 8
NEWEST, BEFORE = "step-00000006", "step-00000004"

YAML = """
version: 1
run:       {name: mine, dir: whole, seed: 1, steps: 8, device: cpu}
model:     {target: "troubles:Line"}
objective: {target: "troubles:squares"}
data:      {train: {target: "troubles:points"}, global_batch: 8, micro_batch: 2}
optim:     {target: torch.optim.AdamW, args: {lr: 0.05}}
strategy:  {name: fsdp}
checkpoint: {every: 2, keep_last: 9, at_end: false}
report:    {every: 1, progress: false, plot: false}
"""


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def with_a_zeroed_page(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(bytes(min(4096, len(content))) + content[4096:])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def missing(file: Path) -> None:
    file.unlink()


def of_the_step_before(file: Path) -> None:
    shutil.copy(file.parent.parent / BEFORE / file.name, file)


def a_link(file: Path) -> None:
    file.rename(file.parent.parent / f"moved-{file.name}")
    file.symlink_to(file.parent.parent / f"moved-{file.name}")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.witness,)


def a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Trap(Path("ran").absolute())))


KINDS: list[Callable[[Path], None]] = [
    flipped,
    torn,
    emptied,
    with_a_zeroed_page,
    longer,
    missing,
    of_the_step_before,
    a_link,
    a_pickle,
]
FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")


def train(overrides: list[str], said: str) -> int:
    """Run `disttrain.run` as one rank. Its output goes to a file."""
    descriptor = os.open(f"{said}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    before = os.dup(2)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        from disttrain.run import main

        return main(["mine.yaml", *overrides])
    finally:
        os.dup2(before, 2)


def resume_all(cases: list[str]) -> list[int]:
    """Run the same training in each of these folders, one after another, on one rank."""
    return [train([f"run.dir={case}"], f"{case}/said") for case in cases]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(PROJECT / "tests" / "models" / "troubles.py", tmp_path)
    (tmp_path / "mine.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr", "samples")} for line in metrics(run)]


def rejected(run: Path) -> list[tuple[str, str]]:
    """(folder's name, reason) of each checkpoint that the ledger reports as rejected."""
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [(Path(one["path"]).name, one["reason"]) for one in lines if one["event"] == "checkpoint_rejected"]


def unfinished(case: str) -> Path:
    """A copy of the run as it is after a kill that followed the newest checkpoint."""
    run = Path(case) / "mine"
    shutil.copytree("whole/mine", run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running", "step": 6, "exit_code": None}))
    return run


@pytest.mark.slow
def test_the_run_continues_past_any_damaged_file_and_names_it(folder: Path) -> None:
    assert run_world(2, train, [], "first") == [0, 0]
    expected = numbers(Path("whole/mine"))
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    cases = {f"{kind.__name__}-{name}": (kind, name) for kind in KINDS for name in FILES}
    for case, (kind, name) in cases.items():
        kind(unfinished(case) / "checkpoints" / NEWEST / name)
    assert run_world(2, resume_all, list(cases)) == [[0] * len(cases)] * 2
    for case, (_, name) in cases.items():
        run = Path(case) / "mine"
        ((what, why),) = rejected(run)
        assert (what, name in why) == (NEWEST, True), (case, why)
        said = Path(f"{case}/said-0").read_text()
        assert "is damaged and was set aside" in said and name in said, (case, said)
        assert "continues at step 4" in said, (case, said)
        assert numbers(run) == expected, case
        assert (run / "checkpoints" / f"rejected-{NEWEST}-1").is_dir()
        assert (run / "checkpoints" / NEWEST / "manifest.json").is_file()  # saved again
    assert not Path("ran").exists()
    print(f"\n{len(cases)} of {len(cases)} damaged runs went on from the checkpoint before")


def test_swapped_files_two_damaged_checkpoints_and_pickles_of_any_name(folder: Path) -> None:
    assert run_world(2, train, [], "first") == [0, 0]
    expected = numbers(Path("whole/mine"))

    newest = unfinished("swapped") / "checkpoints" / NEWEST
    (newest / FILES[1]).rename(newest / "aside")
    (newest / FILES[2]).rename(newest / FILES[1])
    (newest / "aside").rename(newest / FILES[2])

    both = unfinished("both") / "checkpoints"
    flipped(both / NEWEST / FILES[2])
    missing(both / BEFORE / FILES[0])

    strays = unfinished("strays") / "checkpoints"
    for stray in ("model.pt", ".metadata", "rank-00009.safetensors", "manifest.pkl", "__0_0.distcp", "latest"):
        a_pickle(strays / NEWEST / stray)
        a_pickle(strays / stray)
    (strays / "step-00000009").mkdir()
    a_pickle(strays / "step-00000009" / "manifest.json")

    cases = ["swapped", "both", "strays"]
    assert run_world(2, resume_all, cases) == [[0] * 3] * 2
    for case, names, step in [
        ("swapped", [NEWEST], 4),
        ("both", [NEWEST, BEFORE], 2),
        ("strays", ["step-00000009"], 6),
    ]:
        assert [name for name, _ in rejected(Path(case) / "mine")] == names
        assert f"continues at step {step}" in Path(f"{case}/said-0").read_text()
        assert numbers(Path(case) / "mine") == expected
    assert not Path("ran").exists()
