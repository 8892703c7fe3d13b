"""Two runs in one folder: the second is rejected with exit code 5 on all ranks, and the first is not disturbed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, metrics, status
from world import run_world

from disttrain.testing.world import _CONTEXT as CONTEXT

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


def hold(proceed: Any) -> None:
    """A run that pauses after its third step until the event is set."""
    import disttrain

    with disttrain.Engine("mine.yaml") as engine:
        engine.prepare("model")
        for micro_batches in engine.batches():
            engine.accumulate("model", micro_batches)
            engine.step("model")
            engine.log()
            if engine.progress.steps == 3:
                proceed.wait(120)
            if engine.should_stop():
                break


def train(wait_s: float, *overrides: str) -> tuple[int, str]:
    """Run `disttrain.run` as one rank, with a short wait for a run that is just ending."""
    from disttrain.report import RunFolder
    from disttrain.run import main

    RunFolder.lock.__defaults__ = (wait_s,)
    said = f"said-{os.environ['RANK']}"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    return main(["mine.yaml", *overrides]), Path(said).read_text()


def content(*folders: Path) -> dict[Path, bytes]:
    """Every file in the folders."""
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("storage", "elsewhere"), [("", []), (', storage: "stored"', ["run.dir=others"])], ids=["run's folder", "storage"]
)
def test_the_second_of_two_runs_is_rejected(
    storage: str, elsewhere: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(PROJECT / "tests" / "models" / "troubles.py", tmp_path)
    (tmp_path / "mine.yaml").write_text(YAML.replace("every: 2", f"every: 2{storage}"))
    monkeypatch.chdir(tmp_path)
    run, proceed = Path("runs/mine"), CONTEXT.Event()
    make: Any = CONTEXT.Process
    first = make(target=hold, args=(proceed,))
    first.start()
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
            assert first.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        before = content(run, Path("stored"))
        refused = run_world(2, train, 0.5, *elsewhere)
        assert [code for code, _ in refused] == [5, 5]
        told = refused[0][1]
        assert all(words in told for words in ("one run at a time may write to", "another process", "run.name"))
        assert "Traceback" not in told
        assert content(run, Path("stored")) == before
        proceed.set()
        first.join(120)
        assert first.exitcode == 0
    finally:
        first.kill()
        first.join()
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))
    assert status(run)["state"] == "finished"
    assert [code for code, _ in run_world(2, train, 0.5)] == [0, 0]  # finished already: there is nothing to reject
