"""Runs docs/reference/checkpoint-formats.md: its commands in order over a real run, its snippets over an engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from launched import PROJECT, launch
from torch import nn
from typer.testing import CliRunner

import disttrain
from disttrain.checkpoint import SoleRank, full_shard, save_checkpoint
from disttrain.cli.ckpt.convert import convert
from disttrain.errors import CheckpointError

PAGE = (PROJECT / "docs" / "reference" / "checkpoint-formats.md").read_text(encoding="utf-8")
COMMAND = "disttrain ckpt convert "


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture
def run_convert() -> Callable[..., Any]:
    """Run the command in this process, with the arguments that the shell would pass."""
    app = typer.Typer()
    app.command()(convert)
    return lambda *words: CliRunner().invoke(app, list(words), catch_exceptions=False)


def make_model() -> nn.Module:
    from disttrain.model import GPT

    return GPT(layers=1, width=32, heads=2, context=16, vocab=256)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a short quick start was trained, and torch saved a checkpoint."""
    import torch.distributed.checkpoint as dcp

    tmp_path = tmp_path_factory.mktemp("trained")
    small = "model.args={layers: 1, width: 32, heads: 2, context: 16, vocab: 256}"
    data = ["data.global_batch=4", "data.micro_batch=4"]
    given = ["run.steps=2", "run.device=cpu", "eval=null", small, *data, f"run.dir={tmp_path / 'runs'}"]
    launch(sys.executable, "-m", "disttrain.run", str(PROJECT / "configs" / "quickstart.yaml"), *given, timeout_s=200)
    dcp.save({"model": make_model().state_dict()}, checkpoint_id=str(tmp_path / "their" / "checkpoint"), no_dist=True)
    return tmp_path


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_and_snippets_do_what_they_say(folder: Path, run_convert: Callable[..., Any]) -> None:
    assert len(commands()) == 5 and all(line.startswith(COMMAND) for line in commands())
    for line in commands()[:4]:
        done = run_convert(*shlex.split(line.removeprefix(COMMAND)))
        assert done.exit_code == 0, done.output
    trained = disttrain.load("runs/quickstart").state_dict()
    for path in ("exported", "model.safetensors", "model.pt", "imported"):
        loaded = disttrain.load(path, make_model=make_model)
        assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items()), path
    (folder / "imported").rename(folder / "first")
    assert run_convert(*shlex.split(commands()[4].removeprefix(COMMAND))).exit_code == 0
    first, second = blocks("python")
    scope: dict[str, Any] = {"make_model": make_model}
    exec(first, scope)
    assert torch.equal(next(iter(scope["model"].state_dict().values())), next(iter(trained.values())))
    config = {"run": {"dir": str(folder / "other"), "device": "cpu"}, "strategy": {"name": "none"}}
    with disttrain.Engine({**config, "report": {"progress": False, "plot": False}}) as engine:
        engine.prepare("model", make_model)
        strict, only = second.splitlines()
        exec(strict, scope := {"engine": engine})
        assert scope["differences"].missing == ()
        with pytest.raises(CheckpointError, match=r"'encoder\.\*'"):
            exec(only, {"engine": engine})


def test_programs_can_read_what_was_written(folder: Path, run_convert: Callable[..., Any]) -> None:
    done = run_convert("runs/quickstart", "there", "--json")
    told = json.loads(done.stdout)
    assert told["path"] == "there" and told["tensors"] == len(disttrain.load("runs/quickstart").state_dict())
    assert told["left_out"] == ["config.json: the model has no Hugging Face config, or could not be built"]
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        run_convert("runs/quickstart", "there")


class Configured(nn.Linear):
    """Shows its config as a Hugging Face model does."""

    class config:  # noqa: N801 - the name in Hugging Face models
        @staticmethod
        def to_json_string() -> str:
            return '{"model_type": "line"}'


def test_a_models_config_is_exported_with_it(tmp_path: Path, run_convert: Callable[..., Any]) -> None:
    model = Configured(2, 1)
    (tmp_path / "lines.py").write_text("from test_checkpoint_formats import Configured as Line\n")
    document = {
        "config": {"version": 1, "model": {"target": "lines:Line", "args": {"in_features": 2, "out_features": 1}}},
        "folder": str(tmp_path),
        "optim": {"model": {}},
    }
    shards = [full_shard(f"model/model/{name}", tensor) for name, tensor in model.state_dict().items()]
    source = save_checkpoint(tmp_path, 1, shards, document, SoleRank())
    assert run_convert(str(source), str(tmp_path / "out")).exit_code == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "line", "architectures": ["Configured"]}
    sys.modules.pop("lines", None)
    (tmp_path / "lines.py").write_text("raise AssertionError('the code of a config was run')\n")
    assert run_convert(str(source), str(tmp_path / "bare"), "--no-build").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["model.safetensors"]


def test_a_config_starts_from_weights_and_may_be_lenient(folder: Path) -> None:
    state = {name: torch.full_like(value, 0.5) for name, value in make_model().state_dict().items()}
    (lost, *kept) = state
    safetensors.torch.save_file({name: state[name] for name in kept}, folder / "part.safetensors")
    given = {
        "run": {"dir": str(folder / "more"), "steps": 1, "device": "cpu"},
        "model": {"target": make_model, "weights": str(folder / "part.safetensors")},
        "objective": {"target": "next_token"},
        "optim": {"target": "torch.optim.SGD", "args": {"lr": 0.1}},
        "report": {"progress": False, "plot": False},
        "strategy": {"name": "fsdp"},
    }
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(lost)}"), disttrain.Engine(given) as engine:
        engine.prepare("model")
    given["model"]["weights_strict"] = False
    given["run"]["name"] = "lenient"
    with disttrain.Engine(given) as engine:
        engine.prepare("model")
        found = engine.full_weights("model")
    assert all(torch.equal(found[name], state[name]) for name in kept) and not torch.equal(found[lost], state[lost])
