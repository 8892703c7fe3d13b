"""`disttrain report`, `eval` and `sample` on real runs, compared with plain PyTorch on the files of the run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_gpt import PlainGPT
from safetensors.torch import load_file

from disttrain.cli import main as cli_main
from disttrain.run import main as run_main

PARTS = """\
import torch
from torch import nn

print("loud_line_parts is imported")


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x):
        return self.line(x)


class Scaled(nn.Module):
    '''An objective with a parameter of its own.'''

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, model, batch):
        return model(batch[0]) * self.scale

    def loss(self, output, batch):
        return ((output - batch[1]) ** 2).sum(), len(output)


def points(count, seed):
    print("data is made")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    return torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))
"""
LINE = """\
version: 1
run: {name: line, seed: 1, epochs: 2, dir: runs}
model: {target: "loud_line_parts:Line"}
objective: {target: "loud_line_parts:Scaled"}
data:
  train: {target: "loud_line_parts:points", args: {count: 20, seed: 0}}
  global_batch: 6
eval: {sets: {held_out: {target: "loud_line_parts:points", args: {count: 13, seed: 5}}}}
optim: {target: torch.optim.SGD, args: {lr: 0.05}}
report: {every: 1, plot: false, progress: false}
"""
TEXT = """\
version: 1
run: {name: text, seed: 3, steps: 60, dir: runs}
model: {target: gpt, args: {layers: 1, width: 16, heads: 2, context: 12, vocab: VOCAB}}
objective: {target: next_token}
data: {train: {target: byte_text, args: {source: some.txt, split: all, context: 12}}, global_batch: 16}
optim: {target: torch.optim.AdamW, args: {lr: 0.03}}
report: {plot: false, progress: false}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder with three finished runs under `runs/`: line, text, and words (a vocabulary of 300)."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "loud_line_parts.py").write_text(PARTS)
    (folder / "some.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    (folder / "line.yaml").write_text(LINE)
    (folder / "text.yaml").write_text(TEXT.replace("VOCAB", "256"))
    (folder / "words.yaml").write_text(TEXT.replace("VOCAB", "300").replace("name: text", "name: words"))
    logger = logging.getLogger("disttrain")
    before, path = (list(logger.handlers), logger.level, logger.propagate), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("line", "text", "words"):
            assert run_main([f"{name}.yaml"]) == 0
        yield folder
    sys.modules.pop("loud_line_parts", None)
    sys.path[:] = path
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def disttrain(monkeypatch: pytest.MonkeyPatch, project: Path) -> Callable[..., int]:
    """The function of the console script, in the project's folder. Returns its exit code for these arguments."""
    monkeypatch.chdir(project)

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["disttrain", *arguments])
        try:
            cli_main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return command


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors, read without disttrain."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    return {name: one for file in checkpoint.glob("*.safetensors") for name, one in load_file(file).items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def plain_loss(run: Path, count: int, seed: int) -> float:
    """The mean squared error of the stored weights of the model and the objective, in float64."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    found = {name.rpartition("/")[2]: tensor.double() for name, tensor in weights(run).items() if "optim" not in name}
    output = (x @ found["line.weight"].T + found["line.bias"]) * found["scale"]
    return float(((output - x.sum(dim=1, keepdim=True)) ** 2).mean())


def test_eval_is_the_loss_of_the_stored_weights(
    project: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = project / "runs" / "line"
    before = contents(project)
    assert disttrain("eval", "runs/line", "--json") == 0
    found = strict(capsys.readouterr().out)  # the output of user code is not in it
    assert found["step"] == 8
    # float32 over 13 samples against float64
    assert found["eval/held_out/loss"] == pytest.approx(plain_loss(run, 13, 5), rel=1e-5)
    assert found["eval/held_out/loss"] == metrics(run)[-1]["eval/held_out/loss"]
    assert disttrain("eval", "runs/line/checkpoints/step-00000008") == 0
    out = capsys.readouterr().out
    assert out.split() == ["eval/held_out/loss", f"{found['eval/held_out/loss']:.6g}"]
    assert contents(project) == before, "the run stays as it was"


def test_eval_finds_the_users_modules_from_any_working_directory(
    project: Path,
    disttrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(project)])
    monkeypatch.delitem(sys.modules, "loud_line_parts")
    assert disttrain("eval", str(project / "runs" / "line"), "--json") == 0
    assert strict(capsys.readouterr().out)["step"] == 8
    assert list(tmp_path.iterdir()) == []


def test_eval_takes_other_sets_from_the_command_line(
    project: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    more = 'eval.sets.more={target: "loud_line_parts:points", args: {count: 7, seed: 9}}'
    assert disttrain("eval", "runs/line", more, "eval.micro_batch=2", "--json") == 0
    found = strict(capsys.readouterr().out)
    assert set(found) == {"step", "eval/held_out/loss", "eval/more/loss"}
    # float32 over 7 samples in micro-batches of 2 against float64
    assert found["eval/more/loss"] == pytest.approx(plain_loss(project / "runs" / "line", 7, 9), rel=1e-5)


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("eval.sets.held_out.args.count=-1", 1),  # the user's code raises it
        ("eval.sets.held_out.target=loud_line_parts:pints", 2),
        ("eval.sets.held_out=3", 2),
        ("run.seed=7", 5),  # the sections that identify the run
    ],
)
def test_an_eval_that_fails_does_not_mark_the_run_as_failed(
    project: Path, disttrain: Callable[..., int], override: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(project)
    try:
        ended = disttrain("eval", "runs/line", override)
    except RuntimeError:  # a traceback for the user, because the defect is in their code
        ended = 1
    assert ended == code
    assert capsys.readouterr().out == ""
    assert contents(project) == before


def test_eval_without_sets_says_what_to_add(
    project: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disttrain("eval", "runs/text") == 2
    assert "its config has no eval.sets" in capsys.readouterr().err


def test_report_shows_the_metrics(
    project: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = metrics(project / "runs" / "line")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8, "20 samples in batches of 6, twice"
    assert disttrain("report", "runs/line", "--json") == 0
    found = strict(capsys.readouterr().out)
    assert (found["run"], found["state"], found["step"], found["total_steps"]) == ("line", "finished", 8, 8)
    one = found["losses"]["loss"]
    assert (one["first"], one["last"], one["best"]) == (losses[0], losses[-1], min(losses))
    assert found["evaluation"] == {"eval/held_out/loss": lines[-1]["eval/held_out/loss"]}
    assert disttrain("report", "runs/line/") == 0
    page = capsys.readouterr().out
    assert "line: finished, step 8/8" in page
    assert f"{losses[-1]:.4g}" in page


def greedy(run: Path, prompt: bytes, length: int, context: int) -> bytes:
    """The likeliest bytes, by a plain decoder with the stored weights."""
    stored = {name.removeprefix("model/model/"): one for name, one in weights(run).items() if name.startswith("model/")}
    model, text = PlainGPT(stored, layers=1, heads=2, kv_heads=2), list(prompt)
    for _ in range(length):
        text.append(int(model(torch.tensor([text[-context:]]))[0, -1].argmax()))
    return bytes(text)


def test_sample_writes_the_models_likeliest_text(
    project: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert disttrain("sample", "runs/text", "--prompt", "It was é", "--bytes", "20", "--temperature", "0") == 0
    expected = greedy(project / "runs" / "text", "It was é".encode(), 20, 12)
    assert capsys.readouterr().out == expected.decode(errors="replace") + "\n"
    assert len(set(expected[9:])) > 3, "a text of one letter would show little"


def test_a_sample_is_a_function_of_its_seed(
    project: Path, disttrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(project)
    texts = []
    for seed in ("1", "1", "2"):
        assert disttrain("sample", "runs/text", "--bytes", "30", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("\n"), "without a prompt, a new line begins"
    assert contents(project) == before


@pytest.mark.parametrize(
    ("run", "found"),
    [("line", "a Line without an attribute `context`"), ("words", "a GPT over 300 tokens")],
)
def test_sample_rejects_a_model_without_a_byte_vocabulary(
    project: Path, disttrain: Callable[..., int], run: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert disttrain("sample", f"runs/{run}") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert found in err and "fix: sample from a language model over" in err


@pytest.mark.parametrize(
    "option", [["--bytes", "0"], ["--seed", "-1"], ["--seed", str(2**63)], ["--temperature", "-1"]]
)
def test_sample_rejects_an_option_out_of_range(disttrain: Callable[..., int], option: list[str]) -> None:
    assert disttrain("sample", "runs/text", *option) == 2


@pytest.mark.parametrize("command", ["report", "eval", "sample"])
@pytest.mark.parametrize(("path", "found"), [("nowhere", "no such folder"), ("line.yaml", ""), (".", "")])
def test_a_path_that_is_no_run_is_rejected_with_code_5(
    project: Path,
    disttrain: Callable[..., int],
    command: str,
    path: str,
    found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(project)
    assert disttrain(command, path) == 5
    out, err = capsys.readouterr()
    assert out == ""
    head, found_line, do_line = err.splitlines()
    assert head.startswith((f"error (exit 5): {path} is not ", f"error (exit 5): Cannot load {path}."))
    assert found_line.startswith("  problem: ") and found in found_line
    assert do_line.startswith("  fix: name ")
    assert contents(project) == before
