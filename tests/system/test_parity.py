"""Runs `disttrain parity` on real configs: equal cases, and each cause that the command must name."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, launch

SMALL = ("model.args.layers=1", "model.args.width=32", "model.args.context=32")
CONFIG = """
version: 1
run: {name: mine, seed: 5, steps: 20}
model: {target: "parity_models:Net"}
objective: {target: "parity_models:summed"}
data: {train: {target: "parity_models:points"}, global_batch: 16, micro_batch: 4}
optim: {target: torch.optim.AdamW, args: {lr: 1.0e-2}, clip_norm: 1.0}
schedule: {target: cosine, args: {warmup: 2}}
strategy: {name: ddp}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: a config, and the module that it names."""
    shutil.copy(PROJECT / "tests" / "models" / "parity_models.py", tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def parity(cwd: Path, config: str, *arguments: str, expect: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The command's JSON, and its cases. The folder it runs in must not change."""
    before = sorted(path for path in cwd.iterdir() if path.name != "__pycache__")
    done = launch("disttrain", "parity", config, *arguments, "--json", timeout_s=900, cwd=cwd, expect=expect)
    assert sorted(path for path in cwd.iterdir() if path.name != "__pycache__") == before
    found = json.loads(done.stdout)
    assert found["exit_code"] == expect
    return found, found["cases"]


def named(case: dict[str, Any]) -> list[str]:
    return [cause["cause"] for cause in case["causes"]]


def test_quick_start_is_equal_with_dropout_too(tmp_path: Path) -> None:
    config = str(PROJECT / "configs" / "quickstart.yaml")
    asked = ("--steps", "2", "--strategies", "ddp,fsdp,deepspeed:3", "--world-sizes", "2")
    found, cases = parity(tmp_path, config, *SMALL, "model.args.dropout=0.2", *asked, expect=0)
    assert [case["verdict"] for case in cases] == ["equal"] * 3, cases
    assert found["model"]["draws"] is True
    assert all(case["loss"] < 1e-5 and case["grad_norm"] < 1e-5 and case["parameters"] < 1e-4 for case in cases)
    assert found["reference"]["loss"][1] != found["reference"]["loss"][0] > 1.0


@pytest.mark.slow
def test_one_process_detects_averages_dropout_and_a_clip(folder: Path) -> None:
    """Each with the default set in a world of one, which tries another micro-batch."""
    averaged = "objective.target=parity_models:averaged"
    _, cases = parity(folder, "mine.yaml", "--steps", "2", "--world-sizes", "1", averaged, expect=6)
    assert [case["verdict"] for case in cases] == ["differs", "equal", "equal"]
    assert named(cases[0]) == ["objective"]
    assert (cases[0]["first_step"], cases[0]["micro_batch"]) == (1, 6)

    _, cases = parity(folder, "mine.yaml", "--steps", "2", "--world-sizes", "1", "model.args.dropout=0.2", expect=0)
    assert [case["verdict"] for case in cases] == ["draws", "equal", "equal"]
    assert named(cases[0]) == ["dropout"]

    other = ("--case", "strategy.name=none optim.clip_norm=0.01")
    _, (case,) = parity(folder, "mine.yaml", "--steps", "2", "--world-sizes", "1", *other, expect=6)
    assert named(case) == ["clip"]
    # AdamW's first step does not depend on the scale of the gradient.
    assert (case["first_step"], case["first_in"]) == (2, "parameters")
    assert {one["name"] for one in case["tensors"]} == {"first.weight", "first.bias", "last.weight", "last.bias"}


@pytest.mark.slow
def test_batch_norm_is_named(folder: Path) -> None:
    asked = ("--steps", "2", "--strategies", "ddp", "--world-sizes", "2", "--micro-batches", "4,6")
    _, cases = parity(folder, "mine.yaml", "model.args.norm=true", "optim.clip_norm=null", *asked, expect=6)
    assert [(case["name"], case["micro_batch"]) for case in cases] == [("one process", 6), ("ddp", 4), ("ddp", 6)]
    assert [named(case) for case in cases] == [["batch_statistics"]] * 3
    assert cases[0]["loss"] > 1e-5  # the maths differs
    assert cases[1]["loss"] < 1e-5  # the same maths, but each process keeps statistics of its micro-batches
    assert {one["name"].partition(".")[0] for one in cases[1]["tensors"]} == {"norm"}


@pytest.mark.slow
def test_an_optimizer_that_reads_complete_parameters_is_named(folder: Path) -> None:
    """Strategies that shard parameters reject it before training, with the cause. `ddp` trains it like one process."""
    asked = ("--steps", "1", "--strategies", "ddp,fsdp,deepspeed:2", "--world-sizes", "2")
    found, cases = parity(folder, "mine.yaml", "optim.target=parity_models:NormedSteps", *asked, expect=0)
    assert found["model"]["elementwise"] is False
    assert [case["verdict"] for case in cases] == ["equal", "rejected", "rejected"]
    assert [named(case) for case in cases] == [[], ["optimizer"], ["optimizer"]]


@pytest.mark.slow
def test_a_case_that_dies_or_hangs_hides_no_other(folder: Path) -> None:
    kinds = ("ends", "hangs", "raises")
    cases_asked = [one for kind in kinds for one in ("--case", f"strategy.name=ddp objective.args.how={kind}")]
    asked = ("--steps", "1", "--world-sizes", "1", "--limit-s", "15", *cases_asked, "--strategies", "none")
    _, cases = parity(folder, "mine.yaml", "objective.target=parity_models:Ending", *asked, expect=1)
    by_name = {case["name"].rpartition("=")[2]: case for case in cases}
    assert by_name["none"]["verdict"] == "equal"
    assert [by_name[kind]["verdict"] for kind in kinds] == ["failed"] * 3
    assert [by_name[kind]["error"]["exit_code"] for kind in kinds] == [1, 7, 1]
    assert "without an error message" in by_name["ends"]["error"]["text"]
    assert "the user's own words" in by_name["raises"]["error"]["text"]


def test_an_unreadable_config_is_reported_before_anything_runs(folder: Path) -> None:
    for wrong in (("optim.args.lrr=3",), ("--case", "strategy.nam=fsdp"), ("--world-sizes", "two")):
        done = launch("disttrain", "parity", "mine.yaml", *wrong, timeout_s=240, cwd=folder, expect=2)
        assert done.stderr.startswith("error (exit 2)")
        assert "fix:" in done.stderr


@pytest.mark.slow
def test_a_clip_that_a_native_json_leaves_to_deepspeed_is_named(folder: Path) -> None:
    """DeepSpeed alone would clip at 1.0.

    Here `optim.clip_norm` decides, and the effect of the other value is measured.
    """
    native = "strategy.deepspeed.native={zero_optimization: {stage: 2}}"
    asked = ("--steps", "2", "--strategies", "deepspeed:2", "--world-sizes", "2")
    _, (case,) = parity(folder, "mine.yaml", native, "optim.clip_norm=null", "optim.args.lr=0.1", *asked, expect=0)
    assert case["verdict"] == "equal"
    assert named(case) == ["clip"]
    assert "clips at 1.0" in case["causes"][0]["text"]


def shown() -> list[str]:
    """The commands in docs/reference/parity.md."""
    lines = (PROJECT / "docs" / "reference" / "parity.md").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.startswith("    disttrain parity ")]


@pytest.mark.slow
@pytest.mark.parametrize("command", shown())
def test_commands_of_the_document_run(command: str, tmp_path: Path) -> None:
    """Shortened. The first command, the default set, runs with `none` only. The slow test runs it in full."""
    little = ("--steps", "1", *(() if "--" in command else ("--strategies", "none", "--world-sizes", "1")))
    done = launch(*shlex.split(command), *SMALL, *little, f"run.dir={tmp_path}", timeout_s=900)
    assert "differs" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_start_in_full_with_the_default_set(tmp_path: Path) -> None:
    done = launch("disttrain", "parity", "configs/quickstart.yaml", timeout_s=1700)
    assert done.stdout.rstrip().splitlines()[-1].startswith("All ")
    print(done.stdout)
