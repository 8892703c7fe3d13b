"""Runs the README's commands and code, shortened. The commands that other tests run are listed here."""

from __future__ import annotations

import math
import re
import sys
import tomllib
from pathlib import Path

import pytest
from launched import PROJECT, column, launch, user_environment

README = (PROJECT / "README.md").read_text(encoding="utf-8")
FIRST_RUN = (PROJECT / "docs" / "tutorials" / "first-run.md").read_text(encoding="utf-8")
SET_UP = ("bash launch/quickstart.sh", "bash launch/test.sh")
ACTIVATE = "source .venv/bin/activate"
# Started by test_slurm.py, test_accelerate.py and test_parity.py.
ELSEWHERE = ("sbatch ", "accelerate launch ", "disttrain parity ")
# How a command is shortened, by the config it names. test_configs.py runs the small configs in full.
SHORT = {
    "configs/quickstart.yaml": ("run.steps=3", "eval.at_end=false"),
    "configs/digits.yaml": ("run.epochs=2",),
    "mine.yaml": (),
}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def lines_of(language: str, text: str = README) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(language, text) for line in block.splitlines()]
    return [line for line in lines if line]


def commands() -> list[str]:
    """Every command in the README: the lines of bash blocks, and inline code that starts a run."""
    inline = re.findall(r"`((?:python|torchrun|sbatch|accelerate|disttrain train) [^`]+)`", README)
    return list(dict.fromkeys([*lines_of("bash"), *inline]))


def training_commands() -> list[str]:
    return [one for one in commands() if one.startswith(("python", "torchrun", "disttrain train"))]


def install_commands() -> list[str]:
    return [one for one in commands() if one.startswith("pip install")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: the README's files under the names in their first lines, and the configs."""
    for block in [*blocks("python"), *blocks("yaml")]:
        name = re.fullmatch(r"# (\w+\.(?:py|yaml))", block.splitlines()[0])
        assert name, f"a block's first line names its file: {block.splitlines()[0]}"
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    return tmp_path


def test_every_command_is_run_by_some_test() -> None:
    assert {*SET_UP, ACTIVATE} <= set(commands())
    rest = set(commands()) - {*SET_UP, ACTIVATE, *training_commands(), *install_commands()}
    assert len(rest) == len(ELSEWHERE)
    assert all(one.startswith(ELSEWHERE) and "configs/quickstart.yaml" in one for one in rest)


def test_links_and_scripts_exist() -> None:
    targets = [one for one in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in one]
    targets += re.findall(r"(?:launch|slurm|configs)/[\w./-]+\w", README)
    assert [one for one in targets if not (PROJECT / one).exists()] == []


def test_first_run_page_starts_with_the_same_quick_start() -> None:
    assert lines_of("bash", FIRST_RUN) == [SET_UP[0], ACTIVATE]


def test_extras_in_the_readme_are_those_of_the_package() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = README[README.index("| extra |") : README.index("## Status")]
    named = {
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == set(project["optional-dependencies"])


def test_your_model_takes_ten_lines() -> None:
    yaml, python = blocks("yaml")[0], blocks("python")[1]
    for block in (yaml, python):
        lines = [line for line in block.splitlines()[1:] if line.strip()]
        assert len(lines) <= 10, f"{len(lines)} lines:\n{block}"


@pytest.mark.parametrize("command", training_commands())
def test_command_trains(command: str, folder: Path) -> None:
    words = command.replace("nproc_per_node=8", "nproc_per_node=2").split()
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    elif words[0] == "python":
        words[0] = sys.executable
    config = next(word for word in words if word.endswith(".yaml"))
    launch(*words, "report.progress=false", *SHORT[config], timeout_s=300, cwd=folder)
    assert len(list((folder / "runs").glob("*/status.json"))) == 1


def test_python_block_trains_and_loads(folder: Path) -> None:
    launch(sys.executable, "mine_in_python.py", timeout_s=300, cwd=folder)
    assert (folder / "runs" / "mine-in-python" / "status.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_install_commands_work_in_an_empty_environment(tmp_path: Path) -> None:
    launch("git", "clone", "--quiet", str(PROJECT), str(tmp_path / "clone"), timeout_s=240)
    launch(getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(tmp_path / "venv"), timeout_s=240)
    tools = tmp_path / "venv" / "bin"
    environment = user_environment()
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    environment.pop("PYTHONPATH")
    for command in install_commands():
        launch("bash", "-c", command, timeout_s=1700, cwd=tmp_path / "clone", environment=environment)
    config = str(PROJECT / "configs" / "quickstart.yaml")
    short = (*SHORT["configs/quickstart.yaml"], "strategy.name=deepspeed", "eval.every=null", "report.progress=false")
    launch(
        str(tools / "python"),
        "-m",
        "disttrain.run",
        config,
        *short,
        timeout_s=300,
        cwd=tmp_path,
        environment=environment,
    )
    assert (tmp_path / "runs" / "quickstart" / "status.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_start_works_in_a_clone_with_nothing_installed(tmp_path: Path) -> None:
    launch("git", "clone", "--quiet", str(PROJECT), str(tmp_path / "clone"), timeout_s=240)
    environment = user_environment(PYTHON=getattr(sys, "_base_executable", sys.executable))
    environment.pop("PYTHONPATH")
    done = launch(*SET_UP[0].split(), timeout_s=1700, cwd=tmp_path / "clone", environment=environment)
    run = tmp_path / "clone" / "runs" / "quickstart"
    assert (run / "loss.png").exists()
    held_out = column(run, "eval/held_out/loss")
    assert held_out[max(held_out)] / math.log(2) < 2.1  # bits per byte
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_suite_passes_in_a_clone_with_nothing_installed(tmp_path: Path) -> None:
    launch("git", "clone", "--quiet", str(PROJECT), str(tmp_path / "clone"), timeout_s=240)
    environment = user_environment(PYTHON=getattr(sys, "_base_executable", sys.executable))
    environment.pop("PYTHONPATH")
    done = launch(*SET_UP[1].split(), timeout_s=3500, cwd=tmp_path / "clone", environment=environment)
    assert "passed" in done.stdout.strip().splitlines()[-1]
