"""Assigns every page of docs/ with commands to the test that runs them, and runs those that no other test runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launched import PROJECT, column, launch

# The test that runs a page's commands. Benchmarks and slow tests take long, so the tests run shorter parts of them.
# test_tutorials.py runs the tutorials.
STARTED_BY = {
    "accelerate.md": "test_accelerate.py",
    "checkpoint-commands.md": "test_checkpoint_page.py",
    "checkpoint-formats.md": "test_checkpoint_formats.py",
    "parity.md": "test_parity.py",
    "plugins.md": "test_plugin.py",
    "checkpoint-proof.md": "../contract/test_checkpoint_matrix.py",
    "configuration.md": "test_documents.py",
    "contract.md": "../contract/test_strategies.py",
    "hardware.md": "test_gpu.py",
    "index.md": "test_readme.py",
    "memory.md": "test_memory_formula.py",
    "speed.md": "test_documents.py",
    "strategies.md": "test_documents.py",
}
TRAINED_HERE = ("configuration.md", "strategies.md")
PROGRAM = r"torchrun|python|accelerate|pip|bash|disttrain (?:train|check|parity|report|eval|sample|ckpt)"
COMMAND = re.compile(rf"^(?: {{4}})?((?:{PROGRAM}) .+)$", re.MULTILINE)
SHORT = ("run.steps=2", "run.device=cpu", "eval.every=null", "eval.at_end=false", "report.every=1")


def commands_of(page: Path) -> list[str]:
    return [command.split("  #")[0].strip() for command in COMMAND.findall(page.read_text(encoding="utf-8"))]


def training_commands() -> list[str]:
    pages = [PROJECT / "docs" / "reference" / name for name in TRAINED_HERE]
    return [command for page in pages for command in commands_of(page)]


def test_every_page_with_commands_has_a_test_that_runs_them() -> None:
    pages = [page for page in (PROJECT / "docs").rglob("*.md") if page.parent.name != "tutorials"]
    assert {page.name for page in pages if commands_of(page)} == set(STARTED_BY)
    assert all((PROJECT / "tests" / "system" / test).exists() for test in STARTED_BY.values())


def test_pages_name_tests_and_benchmarks_that_exist() -> None:
    for page in (PROJECT / "docs").rglob("*.md"):
        for command in commands_of(page):
            paths = [word for word in command.split() if re.match(r"(tests|benchmarks|configs|launch)/", word)]
            assert [path for path in paths if not (PROJECT / path).exists()] == [], f"{page.name}: {command}"


def test_landing_page_shows_the_commands_of_the_readme() -> None:
    readme = commands_of(PROJECT / "README.md")
    assert set(commands_of(PROJECT / "docs" / "index.md")) <= set(readme)


@pytest.mark.parametrize("command", training_commands())
def test_command_runs(command: str, tmp_path: Path) -> None:
    if command.startswith("disttrain check "):
        assert "lr: 0.001  # override" in launch(*command.split(), timeout_s=120).stdout
        return
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()[1:]]
    launch(*words, *SHORT, "report.progress=false", f"run.dir={tmp_path}", timeout_s=300)
    assert len(column(tmp_path / "quickstart", "loss")) == 2


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=pytest.mark.slow) for name in ("none", "ddp")])
def test_the_step_benchmark_prints_a_table(strategy: str) -> None:
    asked = ("--strategies", strategy, "--tensors", "12", "--rounds", "1", "--steps", "20")
    done = launch(sys.executable, "benchmarks/step.py", *asked, timeout_s=300)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows[:4]] == ["loop", "raw", "Engine", "train"]


@pytest.mark.slow
def test_the_checkpoint_benchmark_prints_its_tables() -> None:
    asked = ("--mib", "4", "--rounds", "1", "--simulated", "64")
    done = launch(sys.executable, "benchmarks/checkpoint.py", *asked, timeout_s=300)
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    expected = {"raw", "disttrain", "DCP", "torch.save", "raw, cold", "disttrain, a resume, warm", "copy", "DCP async"}
    assert expected <= set(names)
    sizes = [int(line.split("|")[3]) for line in done.stdout.splitlines() if line.startswith("| each tensor cut")]
    assert max(sizes) < 2 * min(sizes), "a manifest's size is that of the tensors, whatever the ranks"
