"""Several optimizers by `match` equal a plain loop that steps each of them, under every strategy that supports them."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, train_all, worst
from contract.test_user_models import BATCH, SEED, SOURCE, STEPS, user_module
from plain import plain_loop
from torch.utils.data import default_collate
from world import run_world

import disttrain
from disttrain.data import Order
from disttrain.run import main

YAML = """
version: 1
run: {seed: 11, steps: 8, name: mine}
model: {target: "user_models:NanoGPT"}
objective: {target: "user_models:token_loss"}
data: {train: {target: "user_models:Tokens"}, global_batch: 10, micro_batch: 2}
optim:
  - {match: ["h.*.weight", "nothing", "ln_f.*"], target: torch.optim.SGD, args: {lr: 0.1, momentum: 0.9}}
  - {match: "*", target: torch.optim.AdamW, args: {lr: 0.01}, clip_norm: 0.4, decay_vectors: true}
schedule: {target: linear, args: {warmup: 3, end: 0.5}}
checkpoint: {at_end: false}
"""
MUON = """
optim:
  - {match: ["h.*.fc.weight", "h.*.proj.weight"], target: torch.optim.Muon, args: {lr: 0.02}}
  - {match: "*", target: torch.optim.AdamW, args: {lr: 0.01}, clip_norm: 0.4, decay_vectors: true}
"""


@pytest.fixture(autouse=True)
def _another_folder() -> Iterator[None]:
    """Python keeps one module per name, so each test has the user's module in a separate folder."""
    yield
    sys.modules.pop("user_models", None)


def config(folder: Path, optim: str = "") -> Path:
    shutil.copy(SOURCE, folder / "user_models.py")
    (folder / "base.yaml").write_text(YAML.replace('"nothing", ', ""))
    (folder / "mine.yaml").write_text(f"extends: base.yaml\n{optim}")
    return folder / "mine.yaml"


class Both:
    """Two optimizers and the schedule's factor for both, as a script would write it."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers, self.done = optimizers, 0
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        factor = (self.done + 1) / 3 if self.done < 3 else 1 - 0.5 * (self.done - 3) / (STEPS - 3)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        self.done += 1


def expected(first: Any, is_first: Any) -> dict[str, Any]:
    """The plain loop. `first` makes the optimizer of the parameters whose names pass `is_first`."""
    user = user_module()
    torch.manual_seed(SEED)
    model, data = user.NanoGPT(), user.Tokens()
    order, steps = Order(len(data), SEED), []
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, len(data))
        chosen = [data[i] for i in order.indices(epoch, position, BATCH).tolist()]
        steps.append([default_collate(chosen)])
    named = dict(model.named_parameters())
    both = Both(
        first([value for name, value in named.items() if is_first(name)]),
        torch.optim.AdamW([value for name, value in named.items() if not is_first(name)], lr=0.01),
    )
    losses, norms = plain_loop(model, both, steps, user.token_loss, clip=0.4)  # type: ignore[arg-type]
    return {"losses": losses, "norms": norms, "last": model.state_dict()}


def by_sgd() -> dict[str, Any]:
    return expected(
        lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9),
        lambda name: name.startswith("ln_f") or (name.startswith("h.") and name.endswith("weight")),
    )


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3))])
def test_each_trains_what_it_matches_under_one_clipping_and_one_schedule(size: int, tmp_path: Path) -> None:
    cases = {name: STRATEGIES[name] for name in strategies_at(size)}
    plain = by_sgd()
    for name, run in run_world(size, train_all, config(tmp_path), tmp_path / "runs", cases)[0].items():
        # 2e-5, as in other tests: only the order of float32 sums differs.
        assert worst(run["losses"], plain["losses"]) < 2e-5, name
        assert worst(run["norms"], plain["norms"]) < 2e-5, name
        for key, value in plain["last"].items():
            found = torch.from_numpy(run["last"][key])
            assert float((found - value).norm() / value.norm()) < 1e-4, f"{name} {key}"


def train_to(path: Path, folder: Path, name: str, stop: int) -> list[float]:
    with disttrain.Engine(path, [*QUIET, *STRATEGIES[name], f"run.dir={folder}"]) as engine:
        engine.prepare("model")
        losses = []
        for micro_batches in engine.batches():
            losses.append(engine.accumulate("model", micro_batches).loss)
            engine.step("model")
            engine.log()
            if engine.progress.steps == stop:
                engine.save()
                break
        return losses


def test_a_run_continued_under_other_strategies_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    path, losses = config(tmp_path), []
    for stop, (name, size) in ((2, ("zero2", 2)), (4, ("fsdp", 3)), (6, ("zero3", 2)), (8, ("ddp", 2))):
        losses += run_world(size, train_to, path, tmp_path, name, stop)[0]
    assert worst(losses, by_sgd()["losses"]) < 2e-5
    saved = [one.read_text() for one in (tmp_path / "mine" / "checkpoints").glob("*/*.json")]
    assert any(re.search(r'"torch.optim.sgd:SGD",\s*"torch.optim.adamw:AdamW"', text) for text in saved)


def test_muon_for_matrices_and_adamw_for_the_rest(tmp_path: Path) -> None:
    path = config(tmp_path, MUON)
    plain = expected(
        lambda own: torch.optim.Muon(own, lr=0.02),
        lambda name: name.endswith(("fc.weight", "proj.weight")),
    )
    for size, name in ((1, "none"), (2, "ddp")):
        run = run_world(size, train_all, path, tmp_path / "runs", {name: STRATEGIES[name]})[0][name]
        # Muon's products are bfloat16: the order of the float32 sums before them can change one of their roundings.
        assert worst(run["losses"], plain["losses"]) < 1e-3, name
        assert worst(run["norms"], plain["norms"]) < 2e-2, name


@pytest.mark.parametrize(
    ("name", "told"), [("fsdp", "shards parameters by rows"), ("zero1", "steps flat parts of parameters")]
)
def test_optimizers_that_cannot_be_sharded_are_rejected_by_name_before_the_group(
    name: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config(tmp_path, MUON)), *QUIET, *STRATEGIES[name], f"run.dir={tmp_path}"]) == 2
    err = capfd.readouterr().err
    assert told in err and "Muon" in err and "Traceback" not in err
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.1.match=wte.*", "ln_f|h.0.ln.bias"),
        ("optim.0.match=['h.*','hh.*']", r"'hh\.\*' matches none of"),
        ("optim.0.match='*'", "earlier optimizers take all parameters"),
        ("optim.1.no_decay=['ln_f.bias','ln_f.weight']", r"optim\.1\.no_decay"),
    ],
)
def test_optimizers_that_do_not_cover_the_model_are_reported(
    override: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    over = [*QUIET, "strategy.name=none", f"run.dir={tmp_path}", override]
    assert main([str(config(tmp_path)), *over]) == 2
    assert re.search(told, capfd.readouterr().err)
