"""`model.sync_batch_norm`: all ranks together equal one process that joins their micro-batches of a round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, to_numpy, worst
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain.errors import ConfigError
from disttrain.model import synchronize_batch_norm

SEED, STEPS, RATE = 4, 4, 0.1


class Net(nn.Module):
    """Batch norms of one and of two dimensions, one without weights, one whose mean is over all batches so far."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
        self.line = nn.Linear(5 * 2 * 2, 3)
        self.norm = nn.BatchNorm1d(3, momentum=None)
        self.bare = nn.BatchNorm1d(3, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(torch.tanh(self.norm(self.line(self.image(x)))))


def samples(step: int) -> Tensor:
    """Far from zero, where a sum of squares alone would lose digits."""
    generator = torch.Generator().manual_seed(step)
    return 4.0 + torch.randn(11, 2, 4, 4, generator=generator)


def rounds(step: int, size: int) -> list[list[Tensor]]:
    """The micro-batches of each round, one per rank: uneven ones, and a last round that only some ranks have."""
    cuts = {2: [[4, 2], [1, 2], [2]], 3: [[3, 1, 2], [2, 1], [2]]}[size]
    parts = iter(samples(step).split([count for one in cuts for count in one]))
    return [[next(parts) for _ in one] for one in cuts]


def cubes(model: Any, x: Tensor) -> Any:
    found = model(x)
    return (found - x.mean((1, 2, 3))[:, None] + 4.0).pow(2).sum() + found.pow(3).sum(), len(x)


def plain(size: int, dtype: torch.dtype) -> dict[str, Any]:
    """torch's batch norms over the joined micro-batches of a round, then one step for all rounds."""
    torch.manual_seed(SEED)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        parts = [cubes(model, torch.cat(one).to(dtype)) for one in rounds(step, size)]
        loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), torch.inf)))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "last": model.state_dict()}


def train(folder: Path, cases: dict[str, list[str]]) -> dict[str, Any]:
    found = {}
    for name, overrides in cases.items():
        config = {
            "run": {"name": name, "dir": str(folder), "seed": SEED, "steps": STEPS},
            "model": {"target": Net, "sync_batch_norm": True},
            "objective": {"target": cubes},
            "optim": {"target": "torch.optim.SGD", "args": {"lr": RATE, "momentum": 0.9}},
        }
        with disttrain.Engine(config, [*QUIET, *overrides, "checkpoint.at_end=false"]) as engine:
            model = engine.prepare("model")
            losses, norms = [], []
            for step in range(STEPS):
                mine = [one[engine.rank] for one in rounds(step, engine.world_size) if engine.rank < len(one)]
                mine = [x.to(next(model.parameters()).dtype) for x in mine]
                losses.append(engine.accumulate("model", engine.micro_batches(mine)).loss)
                norms.append(engine.step("model").grad_norm)
                engine.log()
            buffers = {key: value.clone().numpy() for key, value in model.named_buffers()}
            found[name] = {"losses": losses, "norms": norms, "buffers": buffers}
            found[name]["last"] = to_numpy(engine.full_weights("model"))
    return found


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ["ddp", "ddp-buckets", "fsdp", "zero1", "zero3", "fsdp64"]),
        (3, ["zero2", "ddp64", "ddp-buckets64", "fsdp64"]),
    ],
)
def test_all_ranks_equal_one_batch_in_one_process(size: int, names: list[str], tmp_path: Path) -> None:
    cases = {
        name: [*STRATEGIES[name.removesuffix("64")], *(["precision.compute=fp64"] if name.endswith("64") else [])]
        for name in names
    }
    ranks = run_world(size, train, tmp_path, cases)
    for name in cases:
        fp64 = name.endswith("64")
        expected = plain(size, torch.float64 if fp64 else torch.float32)
        # float32: batch norms of few samples magnify the order of sums; float64 detects a wrong formula
        bound = 1e-9 if fp64 else 2e-4
        for rank, found in enumerate(ranks):
            assert worst(found[name]["losses"], expected["losses"]) < bound, (name, rank)
            assert worst(found[name]["norms"], expected["norms"]) < bound, (name, rank)
            for key, value in found[name]["buffers"].items():
                torch.testing.assert_close(
                    torch.from_numpy(value), expected["last"][key], rtol=bound, atol=bound, msg=f"{name} {rank} {key}"
                )
        if fp64:
            for key, value in expected["last"].items():
                torch.testing.assert_close(torch.from_numpy(ranks[0][name]["last"][key]), value, rtol=1e-8, atol=1e-9)


def test_a_converted_model_keeps_its_names_classes_and_copies(tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model, before = synchronize_batch_norm(Net()), Net()
    assert list(model.state_dict()) == list(before.state_dict())
    assert isinstance(model.norm, nn.BatchNorm1d)
    assert type(copy.deepcopy(model).norm) is type(model.norm)
    before.load_state_dict(model.state_dict())
    x = samples(0)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)  # without a group it is torch's module


class CustomForward(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return input * 2


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Linear(2, 2), "Linear has no batch norm"),
        (nn.Sequential(CustomForward(2)), r"'0' is a .*\.CustomForward, which has a custom forward"),
    ],
    ids=["none", "own"],
)
def test_modules_that_cannot_be_synchronized_are_reported(model: nn.Module, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        synchronize_batch_norm(model)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def squares(model: Any, x: Tensor) -> Any:
    return model(x).square().sum(), len(x)


def test_a_batch_norm_of_one_sample_gets_an_error_with_the_fix(tmp_path: Path) -> None:
    config = {
        "run": {"name": "single", "dir": str(tmp_path), "epochs": 1},
        "model": {"target": Flat},
        "objective": {"target": squares},
        "data": {"train": {"target": nine}, "global_batch": 4},
        "optim": {"target": "torch.optim.SGD", "args": {"lr": 0.1}},
        "strategy": {"name": "ddp"},
    }
    with pytest.raises(ConfigError, match=r"data\.last=drop(.|\n)*model\.sync_batch_norm=true"):
        disttrain.train(config, QUIET)  # nine samples in steps of four: the last step has one
    assert disttrain.train(config, [*QUIET, "data.last=drop", "run.name=dropped"]).step == 2


def nine() -> Tensor:
    return torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
