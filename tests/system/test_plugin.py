"""A strategy from an installed package is checked, trained and held to the contract: docs/reference/plugins.md."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from launched import PROJECT, column, launch, user_environment

DOCS = (PROJECT / "docs" / "reference" / "plugins.md").read_text(encoding="utf-8")
PACKAGE = PROJECT / "tests" / "plugin_package"
QUICK = ("run.steps=3", "run.device=cpu", "eval.at_end=false", "report.progress=false", "report.every=1")
SMALL = ("model.args.layers=2", "model.args.width=32", "eval.sets={}", "eval.every=null")


def blocks(language: str) -> list[str]:
    """The docs' fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the plug-in is installed as well, by the command in the docs."""
    place = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "plugin_package")
    words = [str(source) if word == "tests/plugin_package" else word for word in COMMANDS[0].split()]
    launch(sys.executable, "-m", *words, "--quiet", "--target", str(place), timeout_s=300, cwd=place)
    found = user_environment()
    return {**found, "PYTHONPATH": f"{found['PYTHONPATH']}:{place}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: the quick start's config and the plug-in's tests, away from this project's pytest settings."""
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    shutil.copytree(PACKAGE, tmp_path / "tests" / "plugin_package")
    return tmp_path


def test_docs_show_what_the_package_holds() -> None:
    files = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*") if path.suffix in (".py", ".toml")]
    shown = [*blocks("python"), *blocks("toml")]
    assert len(shown) == 4
    assert [block for block in shown if not any(block.strip("\n") in text for text in files)] == []
    assert [command.split()[0] for command in COMMANDS] == ["pip", "disttrain", "torchrun", "python"]


def test_check_knows_its_options(environment: dict[str, str], folder: Path) -> None:
    done = launch(*COMMANDS[1].split(), timeout_s=240, cwd=folder, environment=environment)
    assert "bucket_mb: 4" in done.stdout
    silent = "disttrain check configs/quickstart.yaml strategy.name=one_sum"
    default = launch(*silent.split(), timeout_s=240, cwd=folder, environment=environment).stdout
    assert "bucket_mb: 25.0" in default, "what is left out is stated"
    wrong = COMMANDS[1].replace("bucket_mb=", "bucket_mbs=")
    done = launch(*wrong.split(), timeout_s=240, cwd=folder, environment=environment, expect=2)
    assert "did you mean 'bucket_mb'?" in done.stderr
    wrong = COMMANDS[1].replace("bucket_mb=4", "bucket_mb=0")
    assert "bucket_mb" in launch(*wrong.split(), timeout_s=240, cwd=folder, environment=environment, expect=2).stderr


def test_an_absent_or_misspelt_plugin_is_reported(environment: dict[str, str], folder: Path) -> None:
    near = ("disttrain", "check", "configs/quickstart.yaml", "strategy.name=one_sun")
    assert (
        "did you mean 'one_sum'" in launch(*near, timeout_s=240, cwd=folder, environment=environment, expect=2).stderr
    )
    done = launch(*COMMANDS[1].split(), timeout_s=240, cwd=folder, expect=2)
    assert "no built-in or installed strategy has that name" in done.stderr
    assert "or pip install its package" in done.stderr


def test_trains_by_one_line(environment: dict[str, str], folder: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *COMMANDS[2].split()[1:], *QUICK, *SMALL]
    launch(*words, timeout_s=300, cwd=folder, environment=environment)
    alone = [sys.executable, "-m", "disttrain.run", "configs/quickstart.yaml", *QUICK, *SMALL, "run.name=alone"]
    launch(*alone, "strategy.name=none", timeout_s=300, cwd=folder, environment=environment)
    losses, expected = (column(folder / "runs" / name, "loss") for name in ("quickstart", "alone"))
    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-5)


def test_passes_the_contract(environment: dict[str, str], folder: Path) -> None:
    done = launch(sys.executable, *COMMANDS[3].split()[1:], "-q", timeout_s=600, cwd=folder, environment=environment)
    assert re.search(r"^3 passed", done.stdout, flags=re.MULTILINE), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_passes_the_complete_contract(environment: dict[str, str], folder: Path) -> None:
    test = folder / "tests" / "plugin_package" / "tests" / "test_one_sum.py"
    text = (
        test.read_text(encoding="utf-8").replace("whole = False", "whole = True").replace("(1, 2, 3)", "(1, 2, 3, 4)")
    )
    test.write_text(text, encoding="utf-8")
    words = (sys.executable, *COMMANDS[3].split()[1:], "-q", "-s")
    done = launch(*words, timeout_s=7000, cwd=folder, environment=environment)
    print(done.stdout)
    passed = re.search(r"^(\d+) passed", done.stdout, flags=re.MULTILINE)
    assert passed and int(passed[1]) > 19, (
        done.stdout
    )  # more than the sample above: a fourth world size, every precision
