"""Bad configs: `disttrain check` and `disttrain.run` reject each with exit code 2 and one message.

The message names the key, its file and line, the problem and the fix. No process group, no user code, no files.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from disttrain.cli import main as cli_main
from disttrain.run import main as run_main

SCRIPT = str(Path(sys.executable).with_name("disttrain"))

GOOD = """\
version: 1
run: {name: refused, seed: 1, steps: 3}
model: {target: "bad_config_parts:Net", args: {width: 4}}
objective: {target: mse}
data:
  train: {target: "bad_config_parts:make_data", args: {count: 8}}
  global_batch: 4
optim: {target: torch.optim.SGD, args: {lr: 0.1}}
strategy: {name: ddp}
"""
# A module that a run would import. It creates a file when it is imported.
PARTS = """\
import pathlib
pathlib.Path(__file__).with_name("user code ran").touch()
class Net:
    def __init__(self, width): ...
def make_data(count): ...
"""


def with_line(number: int, text: str) -> str:
    """The good config with one line replaced."""
    lines = GOOD.splitlines()
    lines[number - 1] = text
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Bad:
    """A bad config and its expected message. `says` holds (key, line, part of the problem, part of the fix)."""

    text: str | None
    says: tuple[tuple[str, int, str, str], ...]
    files: dict[str, str] = field(default_factory=dict)
    where: str = "project/c.yaml"


def one(line: int, text: str, key: str, found: str, do: str) -> Bad:
    """The good config with one line replaced, which causes one problem."""
    return Bad(with_line(line, text), ((key, line, found, do),))


MANY = """\
version: 1
run:
  name: refused
  stps: 3
  steps: ten
  epochs: 2
model: {target: gtp}
objective: {target: mse}
data:
  train: {target: "bad_config_parts:make_dta", args: {count: 8}}
  collate: {target: "nowhere.parts:collate"}
  global_batch: 4
  micro_batch: 9
optim: {target: torch.optim.SGD, args: {lrr: 0.1}}
schedule: {target: cosine, args: {warmup: "${run.warm}"}}
mesh: {pipeline: 2}
strategy:
  name: fsdpp
  fsdp: {reshrd: true}
  name: ddp
precision: {compute: fp8}
report: {every: 0}
"""
MANY_SAYS = (
    ("run.stps", 4, "unknown key 'stps'", "did you mean 'steps'?"),
    ("run.steps", 5, "'ten': not a number", "without quotes"),
    ("run.epochs", 6, "run.steps and run.epochs", "keep one"),
    ("model.target", 7, "'gtp'", "did you mean 'gpt'?"),
    ("data.train.target", 10, "has no 'make_dta'", "did you mean 'make_data'?"),
    ("data.collate.target", 11, "no module 'nowhere.parts'", "install the package"),
    ("data.micro_batch", 13, "more than data.global_batch, which is 4", "at most 4"),
    ("optim.args.lrr", 14, "no argument 'lrr'", "did you mean 'lr'?"),
    ("schedule.args.warmup", 15, "${run.warm} refers to a key that this config does not set", "known:"),
    ("mesh.pipeline", 16, "reserved", "remove the key"),
    ("strategy.fsdp.reshrd", 19, "unknown key", "did you mean 'reshard'?"),
    ("strategy.name", 20, "the key of line 18 again", "keep one of the two"),
    ("precision.compute", 21, "fp8", "write 'fp32'"),
    ("report.every", 22, "0", "greater than 0"),
)

BAD = {
    "misspelt key": one(2, "run: {name: a, stps: 3, steps: 3}", "run.stps", "unknown key 'stps'", "mean 'steps'?"),
    "misspelt section": one(9, "stratgy: {name: ddp}", "stratgy", "unknown key 'stratgy'", "did you mean 'strategy'?"),
    "key of another section": one(
        2, "run: {name: a, steps: 3, global_batch: 4}", "run.global_batch", "unknown key", "'data.global_batch'"
    ),
    "wrong type": one(2, "run: {name: a, steps: ten}", "run.steps", "'ten': not a number", "write a number"),
    "number in quotes": one(2, "run: {name: a, steps: '3'}", "run.steps", "'3': not a number", "without quotes"),
    "out of range": one(2, "run: {name: a, steps: 0}", "run.steps", "0", "greater than 0"),
    "unknown short name": one(4, "objective: {target: msee}", "objective.target", "'msee'", "did you mean 'mse'?"),
    "no import path": one(8, "optim: {target: AdamW}", "optim.target", "'AdamW'", "torch.optim.AdamW"),
    "missing module": one(
        3, 'model: {target: "bad_config_prts:Net"}', "model.target", "no module 'bad_config_prts'", "correct the path"
    ),
    "missing attribute": one(
        3, 'model: {target: "bad_config_parts:Nett"}', "model.target", "bad_config_parts.py has no 'Nett'", "'Net'?"
    ),
    "wrong argument": one(
        3,
        'model: {target: "bad_config_parts:Net", args: {width: 1, widht: 4}}',
        "model.args.widht",
        "no argument 'widht'",
        "did you mean 'width'?",
    ),
    "missing argument": one(3, 'model: {target: "bad_config_parts:Net"}', "model.target", "width", "add them under"),
    "wrong argument of torch's": one(
        8, "optim: {target: torch.optim.SGD, args: {lr: 1, momentm: 0}}", "optim.args.momentm", "momentm", "'momentum'?"
    ),
    "bad reference": one(
        2, 'run: {name: a, steps: 3, seed: "${run.sed}"}', "run.seed", "${run.sed} refers to a key", "mean 'run.seed'?"
    ),
    "circle of references": one(2, 'run: {name: a, steps: "${run.steps}"}', "run.steps", "a circle", "replace one of"),
    "duplicate key": one(2, "run: {name: a, steps: 3, steps: 4}", "run.steps", "the key of line 2 again", "keep one"),
    "two lengths": one(
        2, "run: {name: a, steps: 3, epochs: 2}", "run.epochs", "run.steps and run.epochs", "steps=null"
    ),
    "no length": one(2, "run: {name: a}", "run.steps", "none of run.steps, run.epochs", "run.steps=1000"),
    "micro over global": one(
        7, "  micro_batch: 5\n  global_batch: 4", "data.micro_batch", "5, more than data.global_batch", "at most 4"
    ),
    "unknown strategy": one(9, "strategy: {name: fsdpp}", "strategy.name", "'fsdpp'", "did you mean 'fsdp'?"),
    "bad strategy option": one(
        9, "strategy: {name: ddp, fsdp: {reshrd: true}}", "strategy.fsdp.reshrd", "unknown key", "mean 'reshard'?"
    ),
    "option for all strategies": one(
        9, "strategy: {name: ddp, bucket_mb: 5}", "strategy.bucket_mb", "'bucket_mb'", "known: ddp, deepspeed, fsdp"
    ),
    "reserved mesh axis": one(9, "mesh: {pipeline: 2}", "mesh.pipeline", "reserved for a later", "remove the key"),
    "a text for a target": one(4, "objective: mse", "objective", "'mse'", "{target: mse}"),
    "code in a tag": one(4, "objective: !!python/name:os.system x", "objective", "the tag", "remove the tag"),
    "another version": one(1, "version: 2", "version", "2", "write version: 1"),
    "not YAML": Bad(with_line(4, "objective: [mse"), (("", 5, "not YAML", "correct that line"),)),
    "empty file": Bad("", (("", 1, "an empty file", "write sections"),)),
    "a list": Bad("- run\n", (("", 1, "a list", "write sections"),)),
    "circle of extends": Bad(
        "extends: other.yaml\n",
        (("extends", 1, "a circle: c.yaml -> other.yaml -> c.yaml", "remove `extends`"),),
        {"other.yaml": "extends: c.yaml\n"},
        "project/other.yaml",
    ),
    "extends nothing": Bad("extends: gone.yaml\n", (("extends", 1, "gone.yaml cannot be read", "relative to this"),)),
    "a problem in what it extends": Bad(
        "extends: other.yaml\n",
        (("run.stps", 2, "unknown key 'stps'", "mean 'steps'?"),),
        {"other.yaml": with_line(2, "run: {name: a, steps: 3, stps: 3}")},
        "project/other.yaml",
    ),
    "missing file": Bad(None, (("", 0, "No such file", "name a YAML file"),)),
    "fourteen at once": Bad(MANY, MANY_SAYS),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the user's project in a subfolder. disttrain's logger is restored afterwards."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "bad_config_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("disttrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield tmp_path
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def disttrain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The function of the console script. Returns its exit code for these arguments."""

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli_main()
        return int(ended.value.code or 0)

    return command


def write_config(folder: Path, bad: Bad) -> list[Path]:
    """Write the bad config. Returns the content of the disk before any command reads it."""
    for name, text in {"c.yaml": bad.text, **bad.files}.items():
        if text is not None:
            (folder / "project" / name).write_text(text)
    return sorted(folder.rglob("*"))


def place(bad: Bad, line: int) -> str:
    return f"{bad.where}:{line}" if line else bad.where


def assert_message(bad: Bad, text: str) -> None:
    """`text` is the complete message: every problem in one block, in order, and nothing else."""
    number = f"{len(bad.says)} problem{'' if len(bad.says) == 1 else 's'}"
    first, *lines = text.splitlines()
    assert first == f"error (exit 2): {number} in the config"
    assert len(lines) == 3 * len(bad.says), text
    for (key, line, found, do), at in zip(bad.says, range(0, len(lines), 3), strict=True):
        head, found_line, do_line = lines[at : at + 3]
        assert head == f"  {key or 'config'} ({place(bad, line)})"
        assert found_line.startswith("    problem: ") and found in found_line, text
        assert do_line.startswith("    fix: ") and do in do_line, text


def test_the_good_config_is_good(
    folder: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder, Bad(GOOD, ()))
    assert disttrain("check", "project/c.yaml") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", BAD)
def test_check_rejects_a_bad_config(
    kind: str, folder: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = BAD[kind]
    before = write_config(folder, bad)
    assert disttrain("check", "project/c.yaml") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_message(bad, err)
    assert disttrain("check", "project/c.yaml", "--json") == 2
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["ok"] is False
    assert [(one["key"], one["where"]) for one in found["problems"]] == [
        (key, place(bad, at)) for key, at, *_ in bad.says
    ]
    for told, (_, _, what, do) in zip(found["problems"], bad.says, strict=True):
        assert what in told["problem"] and do in told["fix"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("kind", BAD)
def test_a_run_rejects_a_bad_config(kind: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = write_config(folder, BAD[kind])
    assert run_main(["project/c.yaml"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert_message(BAD[kind], err)  # and so no line of the engine, which logs the process group that it made
    assert sorted(folder.rglob("*")) == before


def test_a_run_rejects_a_bad_config_before_torch_is_loaded(folder: Path) -> None:
    write_config(folder, BAD["wrong type"])
    command = [sys.executable, "-X", "importtime", "-m", "disttrain.run", "project/c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    found = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "disttrain.config" in found and "torch" not in found


@pytest.mark.parametrize("command", [[SCRIPT, "check"], [sys.executable, "-m", "disttrain.run"]], ids=["check", "run"])
def test_a_real_process_ends_with_the_same_code_and_message(command: list[str], folder: Path) -> None:
    before = write_config(folder, BAD["fourteen at once"])
    command = [*command, "project/c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (2, "")
    assert_message(BAD["fourteen at once"], done.stderr)
    assert sorted(folder.rglob("*")) == before


def test_a_world_of_two_prints_the_message_once_and_ends_at_once(folder: Path) -> None:
    bad = BAD["wrong argument"]
    before = write_config(folder, bad)
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*agent, "-m", "disttrain.run", "project/c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    at = done.stderr.index("error (exit 2)")
    assert_message(bad, "\n".join(done.stderr[at:].splitlines()[:4]))
    assert done.stderr.count("error (exit 2)") == 1
    assert "[engine]" not in done.stderr
    assert "exitcode  : 2" in done.stderr, "torchrun's own summary"
    assert sorted(folder.rglob("*")) == before


def test_check_notes_sections_that_only_a_run_needs_and_a_run_rejects_their_absence(
    folder: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_config(folder, Bad("version: 1\nrun: {steps: 3}\nobjective: {target: mse}\n", ()))
    assert disttrain("check", "project/c.yaml") == 0
    assert "no section model, data, optim: enough for a custom training loop" in capsys.readouterr().err
    assert run_main(["project/c.yaml"]) == 2
    says = tuple(
        (name, 1, "the section is missing", f"add the section '{name}'") for name in ("model", "data", "optim")
    )
    assert_message(Bad("", says), capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before


def test_a_bad_override_is_rejected_by_both(
    folder: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder, Bad(GOOD, ()))
    overrides = ["run.steps=[", "optim.args.lr:0.1", "strategy.name=deepspeed", "strategy.deepspeed.stage=0"]
    assert disttrain("check", "project/c.yaml", *overrides) == 2
    told = capsys.readouterr().err
    assert run_main(["project/c.yaml", *overrides]) == 2
    assert capsys.readouterr().err == told
    assert told.count("(override)") == 3 and "use strategy.name=ddp" in told


@pytest.mark.parametrize("arguments", [[], ["chek", "c.yaml"], ["check"], ["check", "c.yaml", "--jsn"], ["report"]])
def test_a_wrong_command_line_exits_with_code_2(
    arguments: list[str], folder: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disttrain(*arguments) == 2
    assert "Usage: disttrain" in "".join(capsys.readouterr())


def test_a_run_without_a_config_prints_its_usage(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run_main([]) == 2
    assert "usage: python -m disttrain.run CONFIG" in capsys.readouterr().err
    assert run_main(["--help"]) == 0
    assert "usage: python -m disttrain.run CONFIG" in capsys.readouterr().out
