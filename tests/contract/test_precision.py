"""Precisions mean the same under every strategy: fp16 like torch's GradScaler, bf16 near float32, stated reductions.

fp16 runs on CPUs here, which support its autocast slowly; the rejection of fp16 on a CPU is disabled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, worst
from plain import plain_loop
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from world import run_world

import disttrain
from disttrain.data import Order
from disttrain.engine import build
from disttrain.errors import LaunchError

SEED, STEPS, BATCH, RATE = 6, 10, 16, 0.02


class Points(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Vectors and their targets. One target is far away, and its gradient overflows fp16 at first."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(64, 4, generator=generator), torch.randn(64, 1, generator=generator)
        self.y[9] = 60.0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2))
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


class Squares:
    """With `weigh`, the weight is known before the first forward, as in the mean loss used with GradScaler."""

    def weigh(self, batch: Any) -> int:
        return len(batch[0])

    def forward(self, model: Any, batch: Any) -> Any:
        return model(batch[0])

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return (output.float() - batch[1]).square().sum()


def squares(model: Any, batch: Any) -> Any:
    x, y = batch
    return (model(x).to(torch.promote_types(torch.float32, model.last.weight.dtype)) - y).square().sum(), len(x)


def batches(micro_batch: int) -> list[list[Any]]:
    """The micro-batches of each step. The indices are passed as data."""
    data, order, steps = Points(), Order(64, SEED), []
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, 64)
        rows = order.indices(epoch, position, BATCH)
        cuts = [rows[at : at + micro_batch] for at in range(0, BATCH, micro_batch)]
        steps.append([(data.x[list(cut)], data.y[list(cut)]) for cut in cuts])
    return steps


def decayed(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.9**step)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


def train(
    folder: Path, name: str, overrides: list[str], objective: Any, micro_batch: int, steps: int
) -> dict[str, Any]:
    config = {"run": {"name": name, "dir": str(folder), "seed": SEED, "steps": steps}}
    with mock.patch.object(build, "check_device"), disttrain.Engine(config, [*QUIET, *overrides]) as engine:
        engine.prepare("model", Net, sgd, decayed)
        losses, outcomes = [], []
        for step in engine.batches(Points(), global_batch=BATCH, micro_batch=micro_batch):
            losses.append(engine.accumulate("model", step, objective).loss)
            outcomes.append(engine.step("model"))
            engine.log()
            if engine.should_stop():
                break
        return {
            "losses": losses,
            "norms": [outcome.grad_norm for outcome in outcomes],
            "applied": [outcome.applied for outcome in outcomes],
            "scales": [outcome.loss_scale for outcome in outcomes],
            "rates": [outcome.lr for outcome in outcomes],
            "skipped": engine.progress.skipped,
            "last": {key: value.tolist() for key, value in engine.full_weights("model").items()},
        }


def train_cases(folder: Path, cases: dict[str, list[str]], objective: Any, micro_batch: int) -> dict[str, Any]:
    return {
        name: train(folder, name.replace("/", "-"), overrides, objective, micro_batch, STEPS)
        for name, overrides in cases.items()
    }


def plain_fp16(micro_batch: int, device: str = "cpu") -> dict[str, Any]:
    """torch's documented recipe: autocast, GradScaler, and a schedule that advances only after a step that was not
    skipped.
    """
    torch.manual_seed(SEED)
    model = Net().to(device)
    optimizer = sgd(model.parameters())
    scaler, schedule = torch.amp.GradScaler(device), decayed(optimizer)
    found: dict[str, Any] = {"losses": [], "applied": [], "scales": [], "rates": []}
    for step in batches(micro_batch):
        loss = 0.0
        for x, y in step:
            with torch.autocast(device, torch.float16):
                part = (model(x.to(device)).float() - y.to(device)).square().sum() / BATCH
            scaler.scale(part).backward()
            loss += part.item()
        scale, rate = scaler.get_scale(), optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        applied = scaler.get_scale() >= scale
        if applied:
            schedule.step()
        for key, value in (("losses", loss), ("applied", applied), ("scales", scale), ("rates", rate)):
            found[key].append(value)
    return found


FP16 = "precision.compute=fp16"


@pytest.mark.parametrize("size", [1, 2])
def test_fp16_equals_torchs_recipe_and_all_ranks_skip_together(size: int, tmp_path: Path) -> None:
    expected = plain_fp16(8)
    assert set(expected["applied"]) == {True, False}
    cases = {name: [*STRATEGIES[name], FP16] for name in strategies_at(size) if not name.startswith("zero")}
    ranks = run_world(size, train_cases, tmp_path, cases, Squares(), 8)
    for name in cases:
        for found in (rank[name] for rank in ranks):
            for key in ("applied", "scales", "rates"):
                assert found[key] == expected[key], (name, key)
            # The roundings to fp16 are equal, except where another order of float32 sums crosses a boundary: 2**-11.
            assert worst(found["losses"], expected["losses"]) < 5e-4, name
            assert found["last"] == ranks[0][name]["last"], name
            assert found["skipped"] == expected["applied"].count(False)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss_scale"] for line in lines] == expected["scales"]
        assert [line.get("skipped", 0) for line in lines][-1] == expected["applied"].count(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp16_on_a_gpu_equals_torchs_recipe(tmp_path: Path) -> None:
    expected = plain_fp16(8, "cuda")
    found = train(tmp_path, "gpu", [*STRATEGIES["none"], FP16, "run.device=cuda"], Squares(), 8, STEPS)
    for key in ("applied", "scales", "rates"):
        assert found[key] == expected[key], key
    assert worst(found["losses"], expected["losses"]) < 5e-4


def test_fp16_without_a_weight_known_in_advance_loses_at_most_one_more_step(tmp_path: Path) -> None:
    """The first step's summed loss is scaled as if its weight were 1.

    Later steps use the weight of the previous step.
    """
    found = train(tmp_path, "sums", [*STRATEGIES["none"], FP16], squares, 8, STEPS)
    expected = plain_fp16(8)
    assert found["applied"].count(False) <= expected["applied"].count(False) + 1
    assert found["scales"][-1] >= expected["scales"][-1] / 2
    assert found["losses"][-1] < found["losses"][1]


def test_fp16_continues_exactly(tmp_path: Path) -> None:
    overrides = [*STRATEGIES["none"], FP16, "checkpoint.every=3"]
    whole = train(tmp_path, "whole", overrides, squares, 4, STEPS)
    first = train(tmp_path, "parts", overrides, squares, 4, 3)
    rest = train(tmp_path, "parts", overrides, squares, 4, STEPS)
    assert False in first["applied"]  # the scale in the checkpoint is not the first one
    for key in ("losses", "norms", "scales", "rates"):
        assert first[key] + rest[key] == whole[key], key
    assert (rest["last"], rest["skipped"]) == (whole["last"], whole["skipped"])


def test_fp16_on_a_cpu_is_rejected_before_a_process_group_exists(tmp_path: Path) -> None:
    config = {"run": {"name": "refused", "dir": str(tmp_path), "steps": 1}}
    with pytest.raises(LaunchError, match="needs a device that computes in fp16"):
        disttrain.Engine(config, [*QUIET, FP16, "run.device=cpu", "strategy.name=none"])


PURE = ["precision.compute=bf16", "precision.master=bf16"]
KINDS = {"mixed": ["precision.compute=bf16"], "pure": PURE}
# bf16 keeps 8 bits: each rounding is off by at most 2**-8 = 4e-3, and by less than half of that on average over the
# elements that a loss or a norm sums. A gradient passes through about ten roundings, which accumulate as their root.
LOSS_BOUND, NORM_BOUND = 2**-8, 10**0.5 * 2**-8


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_stays_near_float32(size: int, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = Net()
    rates = [RATE * 0.9**step for step in range(STEPS)]
    losses, norms = plain_loop(model, sgd(model.parameters()), batches(8), squares, rates=rates)
    names = [name for name in strategies_at(size) if not name.startswith("zero")]
    cases = {f"{name}/{kind}": [*STRATEGIES[name], *more] for name in names for kind, more in KINDS.items()}
    for name, found in run_world(size, train_cases, tmp_path, cases, squares, 8)[0].items():
        # Pure: parameters and momentum are rounded at every step too. Under fsdp, communicated weights and block inputs
        # add roundings: at most three where autocast has one (testing/verdict.py).
        drift = STEPS**0.5 if name.endswith("pure") else 3.0 if name.startswith("fsdp") else 1.0
        assert worst(found["losses"], losses) < drift * LOSS_BOUND, name
        assert worst(found["norms"], norms) < drift * NORM_BOUND, name


def test_pure_bf16_equals_the_plain_loop_on_a_bf16_model(tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = Net().bfloat16()
    steps = [[(x.bfloat16(), y) for x, y in step] for step in batches(BATCH)]
    losses, _ = plain_loop(
        model, sgd(model.parameters()), steps, squares, rates=[RATE * 0.9**step for step in range(STEPS)]
    )
    found = train(tmp_path, "pure", [*STRATEGIES["none"], *PURE], squares, BATCH, STEPS)
    assert found["losses"] == losses
    assert found["last"] == {name: value.tolist() for name, value in model.state_dict().items()}


class Summand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, c: Tensor) -> Tensor:
        return (self.w * c).sum()


def summed(model: Any, c: Tensor) -> Any:
    return model(c).float(), 1.0 if torch.distributed.get_rank() == 0 else 0.0


def add_up(folder: Path, cases: dict[str, tuple[list[str], list[list[float]]]]) -> dict[str, list[float]]:
    """Each rank's gradient is its row of the input.

    The step's weight and the rate are 1, so the weights become minus the sum.
    """
    found = {}
    for name, (overrides, rows) in cases.items():
        config = {"run": {"name": name, "dir": str(folder), "seed": SEED, "steps": 1}}
        with disttrain.Engine(config, [*QUIET, *overrides]) as engine:
            engine.prepare("model", Summand, lambda parameters: torch.optim.SGD(parameters, lr=1.0))
            mine = engine.micro_batches([torch.tensor(rows[engine.rank])])
            engine.accumulate("model", mine, summed)
            engine.step("model")
            engine.log()
            found[name] = [-value for value in engine.full_weights("model")["w"].tolist()]
    return found


def test_ddp_reduces_gradients_in_the_stated_dtype(tmp_path: Path) -> None:
    # bf16 cannot represent 257: gloo rounds 256 + 1 to 256 or 258. Wherever the sum of three starts, one of these three
    # elements starts with 256 and a 1, and does not reach 258.
    large = [[256.0, 1.0, 1.0], [1.0, 256.0, 1.0], [1.0, 1.0, 256.0]]
    fine = [[1.001, 0.0, 0.0], [0.0, 1.001, 0.0], [0.0, 0.0, 1.001]]
    ddp = STRATEGIES["ddp"]
    cases = {
        "pure": ([*ddp, *PURE], large),
        "pure in bf16": ([*ddp, *PURE, "precision.reduce=bf16"], large),
        "wide": (ddp, fine),
        "wide, in buckets": (STRATEGIES["ddp-buckets"], fine),
        "wide in bf16": ([*ddp, "precision.reduce=bf16"], fine),
        "fp64": ([*ddp, "precision.compute=fp64"], large),
        "fp64, in buckets": ([*STRATEGIES["ddp-buckets"], "precision.compute=fp64"], large),
    }
    found = run_world(3, add_up, tmp_path, cases)[0]
    assert found["pure"] == [258.0] * 3
    assert found["pure in bf16"] != [258.0] * 3
    for name in ("wide", "wide, in buckets"):
        assert found[name] == pytest.approx([1.001] * 3, rel=1e-7)
    assert found["wide in bf16"] == [1.0] * 3
    for name in ("fp64", "fp64, in buckets"):
        assert found[name] == pytest.approx([258.0] * 3, rel=1e-14)
