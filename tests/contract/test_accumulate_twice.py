"""Two losses before one step, like the real and fake halves of a discriminator: their gradients add up."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, to_numpy, worst
from torch import Tensor, nn
from world import WorldError, run_world

import disttrain
from disttrain.data import MicroBatch
from disttrain.errors import ConfigError
from disttrain.runtime.seeds import derive_seed

SEED, STEPS, RATE = 5, 3, 0.05


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Scaled(Net):
    """Has a 0-d parameter, which fsdp keeps on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Real(nn.Module):
    """Trained with the model. Every strategy except the ZeRO stages keeps it on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(2))

    def forward(self, model: Any, x: Tensor) -> Any:
        scores = model(x) + self.offset.sum()
        return (scores - 1.0).square().sum(), len(x), {"real": scores.sum()}


def fake(model: Any, x: Tensor) -> Any:
    scores = model(-0.5 * x)
    return scores.square().sum(), len(x), {"fake": scores.sum()}


def batches(step: int) -> list[Tensor]:
    """Four batches for the first loss, uneven. The first three also serve the second loss."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 4, generator=generator) for _ in range(3)] + [torch.randn(1, 4, generator=generator)]


def build(make_model: type[nn.Module]) -> tuple[nn.Module, Real]:
    torch.manual_seed(SEED)
    return make_model(), Real()


def plain(make_model: type[nn.Module]) -> dict[str, Any]:
    """One backward over all batches, divided by all items of both losses."""
    model, real = build(make_model)
    optimizer = torch.optim.SGD([*model.parameters(), *real.parameters()], lr=RATE, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        parts = [real(model, x) for x in batches(step)] + [fake(model, x) for x in batches(step)[:3]]
        loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_([*model.parameters(), *real.parameters()], torch.inf)))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "last": to_numpy({k: v.detach() for k, v in model.state_dict().items()})}


def train(folder: Path, make_model: type[nn.Module], names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        config = {"run": {"name": name, "dir": str(folder), "seed": SEED, "steps": STEPS}}
        with disttrain.Engine(config, [*QUIET, *STRATEGIES[name]]) as engine:
            real = build(make_model)[1]
            make = lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9)  # noqa: E731
            engine.prepare("model", make_model, make, objective=real)
            losses, norms = [], []
            for step in range(STEPS):
                mine = batches(step)[engine.rank :: engine.world_size]
                again = batches(step)[:3][engine.rank :: engine.world_size]
                first = engine.accumulate("model", engine.micro_batches(mine), real)
                more = engine.accumulate("model", engine.micro_batches(again), fake)
                norms.append(engine.step("model").grad_norm)
                engine.log()
                losses.append((first.totals["loss"] + more.totals["loss"]) / (first.weight + more.weight))
            found[name] = {"losses": losses, "norms": norms, "last": to_numpy(engine.full_weights("model"))}
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_accumulations_equal_one_backward_over_both(size: int, tmp_path: Path) -> None:
    expected = plain(Net)
    for name, run in run_world(size, train, tmp_path, Net, strategies_at(size))[0].items():
        # 2e-5, as in other tests: only the order of float32 sums differs.
        assert worst(run["losses"], expected["losses"]) < 2e-5, name
        assert worst(run["norms"], expected["norms"]) < 2e-5, name
        for weight, value in expected["last"].items():
            np.testing.assert_allclose(run["last"][weight], value, rtol=1e-5, atol=1e-6, err_msg=name)


BF16 = {
    "pure": ["precision.compute=bf16", "precision.master=bf16"],
    "reduced": ["precision.reduce=bf16"],
    "reduced in buckets": ["precision.reduce=bf16", "strategy.ddp.bucket_mb=0.00001"],
}


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).sum()


def twice(folder: Path, cases: dict[str, list[str]]) -> dict[str, list[float]]:
    """The weights after a step of rate 1 on two gradients of ones, and on a third whose forward fails after one."""
    found = {}
    for name, overrides in cases.items():
        config = {"run": {"name": name, "dir": str(folder), "seed": SEED, "steps": 2}}
        with disttrain.Engine(config, [*QUIET, *overrides, "checkpoint.at_end=false"]) as engine:
            engine.prepare("model", Line, lambda parameters: torch.optim.SGD(parameters, lr=1.0))
            mine = engine.micro_batches([torch.ones(1, 4)])
            for objectives in ((ones, ones), (ones, failing)):
                for objective in objectives:
                    with contextlib.suppress(MemoryError):
                        engine.accumulate("model", mine, objective)
                engine.step("model")
                engine.log()
                found.setdefault(name, []).append(float(engine.full_weights("model")["w"].float().mean()))
    return found


def ones(model: Any, x: Tensor) -> Any:
    return model(x).float(), 1.0


def failing(model: Any, x: Tensor) -> Any:
    raise MemoryError("on all ranks")


@pytest.mark.parametrize("size", [2, 3])
def test_an_accumulation_is_counted_once_and_survives_a_failure_of_the_next(size: int, tmp_path: Path) -> None:
    ddp = {f"ddp {name}": ["strategy.name=ddp", *more] for name, more in BF16.items()}
    cases = {name: STRATEGIES[name] for name in ("ddp", "ddp-buckets", "fsdp")} | ddp
    for name, weights in run_world(size, twice, tmp_path, cases)[0].items():
        assert weights == [-1.0, -2.0], name


def test_parameters_that_fsdp_replicates_are_added_up_once(tmp_path: Path) -> None:
    expected = plain(Scaled)
    for name, run in run_world(3, train, tmp_path, Scaled, ["ddp", "ddp-buckets", "fsdp"])[0].items():
        assert worst(run["norms"], expected["norms"]) < 2e-5, name
        np.testing.assert_allclose(run["last"]["gain"], expected["last"]["gain"], rtol=1e-5, err_msg=name)


class TwoTerms:
    def weigh(self, x: Tensor) -> dict[str, int]:
        return {"a": len(x), "b": 1}

    def forward(self, model: Any, x: Tensor) -> Tensor:
        return model(x)

    def loss(self, scores: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"a": scores.sum(), "b": scores.square().sum()}


def alone(folder: Path) -> Any:
    config = {"run": {"name": "alone", "dir": str(folder), "seed": SEED, "steps": STEPS}, "strategy": {"name": "none"}}
    return disttrain.Engine(config, QUIET)


def test_several_terms_accumulated_twice_are_rejected_by_name(tmp_path: Path) -> None:
    with alone(tmp_path) as engine:
        engine.prepare("model", Net, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
        engine.accumulate("model", engine.micro_batches(batches(0)), TwoTerms())
        with pytest.raises(ConfigError, match="accumulate a loss of several terms once per step"):
            engine.accumulate("model", engine.micro_batches(batches(0)), TwoTerms())


def test_each_accumulation_draws_its_own_dropout_from_torch_numpy_and_python(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    def draw(model: Any, x: Tensor) -> Any:
        drawn.append((float(torch.rand(())), np.random.random_sample(), random.random()))
        return model(x).sum(), len(x)

    with alone(tmp_path) as engine:
        engine.prepare("model", Net, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
        for _ in range(2):
            for _ in range(2):
                engine.accumulate("model", [MicroBatch(batches(0)[0], 7, True, 0)], draw)
            engine.step("model")
            engine.log()
    keys = [derive_seed(SEED, "step", "model", *rest) for rest in ((0, 7), (0, 7, 1), (1, 7), (1, 7, 1))]
    assert drawn == [
        (
            float(torch.rand((), generator=torch.Generator().manual_seed(key))),
            np.random.RandomState(key % 2**32).random_sample(),
            random.Random(key).random(),
        )
        for key in keys
    ]


def returning(rank: int, case: str) -> dict[str, Tensor]:
    one, hundred = torch.tensor(1.0), torch.tensor([100.0, 200.0])
    return {
        "order": {"a": one, "b": hundred} if rank == 0 else {"b": hundred, "a": one},
        "many": {f"s{place}": torch.tensor(float(place)) for place in (range(90) if rank else reversed(range(90)))},
        "names": {"a": one} if rank == 0 else {"c": one},
        "count": {"a": one} if rank == 0 else {"a": one, "b": hundred},
        "shapes": {"a": one} if rank == 0 else {"a": hundred},
    }[case]


def sums(folder: Path, case: str, strategy: str) -> dict[str, Any]:
    config = {"run": {"name": case, "dir": str(folder), "seed": SEED, "steps": STEPS}}
    with disttrain.Engine(config, [*QUIET, *STRATEGIES[strategy]]) as engine:
        engine.prepare("model", Net, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
        own = lambda model, x: (model(x).sum(), len(x), returning(engine.rank, case))  # noqa: E731
        found = engine.accumulate("model", engine.micro_batches(batches(0)[:1]), own)
        return {name: value.tolist() for name, value in found.sums.items()}


def test_sums_are_added_up_by_name_over_ranks(tmp_path: Path) -> None:
    assert run_world(2, sums, tmp_path, "order", "ddp") == [{"a": 2.0, "b": [200.0, 400.0]}] * 2
    assert run_world(2, sums, tmp_path, "many", "ddp") == [{f"s{place}": 2.0 * place for place in range(90)}] * 2


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("names", r"a \[\] on rank 0, and loss, c \[\]"),
        ("count", r"b \[2\] on rank 1"),
        ("shapes", r"a \[2\] on rank 1"),
    ],
)
def test_ranks_that_return_other_sums_get_an_error_on_every_rank(case: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=told) as caught:
        run_world(2, sums, tmp_path, case, "fsdp")
    assert str(caught.value).count("TrainingError: Cannot add up the objective's terms and sums") == 2
