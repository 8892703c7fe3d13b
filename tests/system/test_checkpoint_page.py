"""Runs every command of docs/reference/checkpoint-commands.md on two real runs of different world sizes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from launched import PROJECT, launch

PAGE = (PROJECT / "docs" / "reference" / "checkpoint-commands.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}(disttrain ckpt .+)$", PAGE, flags=re.MULTILINE)
SMALL = ["model.args.layers=1", "model.args.width=32", "model.args.context=32", "data.micro_batch=8"]
SHORT = ["checkpoint.every=1", "checkpoint.keep_last=9", "report.progress=false", "report.plot=false", "run.device=cpu"]
EXIT = {"diff": 1}  # the page compares two steps, and two runs of several


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with `runs/quickstart`, of one process, and `runs/other`, of two: four steps each."""
    made = tmp_path_factory.mktemp("page")
    config = str(PROJECT / "configs" / "quickstart.yaml")
    (made / "text.txt").write_text("It was the best of times, it was the worst of times. " * 400)
    sources = [f"{key}.args.source={made / 'text.txt'}" for key in ("data.train", "eval.sets.held_out")]
    asked = [config, *SMALL, *SHORT, *sources, "run.steps=4", "eval.every=2"]
    launch(sys.executable, "-m", "disttrain.run", *asked, timeout_s=300, cwd=made)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    other = ["run.name=other", "strategy.name=fsdp"]
    launch(*torchrun, "-m", "disttrain.run", *asked, *other, timeout_s=300, cwd=made)
    return made


def test_every_command_of_the_page_runs(folder: Path) -> None:
    shown = [shlex.split(command) for command in COMMANDS]
    assert [words[2] for words in shown] == ["ls", "inspect", "inspect", "verify", "diff", "diff", "prune", "prune"]
    found = []
    for words in shown:
        # the page is about a run of hundreds of steps, which saves every hundred
        words = ["2" if word == "100" else word.replace("step-00000100", "step-00000001") for word in words]
        found.append(launch(*words, timeout_s=120, cwd=folder, expect=EXIT.get(words[2], 0)).stdout)
    listed, whole, part, verified, worlds, steps, planned, pruned = found

    assert [line.split()[0] for line in listed.splitlines()] == ["step", "1", "2", "3", "4"]
    tensors = int(listed.splitlines()[-1].split()[5])
    assert f"\n{tensors} tensors, " in whole
    names = [line.split()[0] for line in part.splitlines() if line.startswith("model/")]
    assert names and f"\n{len(names)} of {tensors} tensors, " in part
    assert verified.endswith("4 checkpoints, 0 damaged\n")
    # the same step of two worlds: the difference is the rounding of sums
    assert "writer.strategy: ddp in A, fsdp in B" in worlds and "; 0 other values of the state differ." in worlds
    moved = {one["name"]: one for one in json.loads(steps)["differences"]}
    assert moved["optim/model/norm.weight:step"]["absolute"] == {"value": 3.0, "at": [], "a": 1.0, "b": 4.0}
    assert "would remove step-00000001\n" in planned and "would remove 1, " in planned
    lines = [json.loads(line) for line in (folder / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line}
    assert len(evaluated) == 2
    staying = {4, min(evaluated, key=evaluated.__getitem__)}
    assert {int(path.name[5:]) for path in (folder / "runs/quickstart/checkpoints").iterdir()} == staying
    assert re.search(r"^kept step-00000004: intact$", pruned, re.MULTILINE)
