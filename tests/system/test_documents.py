"""The commands in docs/ that no other test starts: run here, shortened; every document's commands are accounted for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launched import PROJECT, column, launch

# What starts a document's commands. Batteries and benchmarks are long: what they are made of runs here or there.
STARTED_BY = {
    "accelerate.md": "test_accelerate.py",
    "checkpoint-commands.md": "test_checkpoint_page.py",
    "checkpoint-formats.md": "test_checkpoint_formats.py",
    "parity.md": "test_parity.py",
    "plugins.md": "test_plugin.py",
    "checkpoint-proof.md": "../contract/test_checkpoint_matrix.py",
    "configuration.md": "test_readme.py",
    "contract.md": "../contract/test_strategies.py",
    "hardware.md": "test_gpu.py",
    "memory.md": "test_memory_formula.py",
    "speed.md": "test_documents.py",
    "strategies.md": "test_documents.py",
}
COMMAND = re.compile(r"^(?: {4})?((?:torchrun|python|accelerate|disttrain|pip|bash) .+)$", re.MULTILINE)
SHORT = ("run.steps=2", "run.device=cpu", "eval.every=null", "eval.at_end=false", "report.every=1")


def test_every_document_with_commands_has_a_test_that_starts_them() -> None:
    found = {path.name for path in (PROJECT / "docs").rglob("*.md") if COMMAND.search(path.read_text(encoding="utf-8"))}
    assert found == set(STARTED_BY)
    assert all((PROJECT / "tests" / "system" / test).exists() for test in STARTED_BY.values())


def test_hybrid_shards_by_one_word(tmp_path: Path) -> None:
    (command,) = COMMAND.findall((PROJECT / "docs" / "reference" / "strategies.md").read_text(encoding="utf-8"))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()[1:]]
    launch(*words, *SHORT, "report.progress=false", f"run.dir={tmp_path}", timeout_s=300)
    assert len(column(tmp_path / "quickstart", "loss")) == 2


@pytest.mark.parametrize("strategy", ["none", pytest.param("ddp", marks=pytest.mark.slow)])
def test_the_step_benchmark_prints_a_table(strategy: str) -> None:
    asked = ("--strategies", strategy, "--tensors", "12", "--rounds", "1", "--steps", "20")
    done = launch(sys.executable, "benchmarks/step.py", *asked, timeout_s=300)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows[:4]] == ["loop", "raw", "Engine", "train"]


def test_the_checkpoint_benchmark_prints_its_tables() -> None:
    asked = ("--mib", "4", "--rounds", "1", "--simulated", "64")
    done = launch(sys.executable, "benchmarks/checkpoint.py", *asked, timeout_s=300)
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    expected = {"raw", "disttrain", "DCP", "torch.save", "raw, cold", "disttrain, a resume, warm", "copy", "DCP async"}
    assert expected <= set(names)
    sizes = [int(line.split("|")[3]) for line in done.stdout.splitlines() if line.startswith("| each tensor cut")]
    assert max(sizes) < 2 * min(sizes), "a manifest's size is that of the tensors, whatever the ranks"
