"""Memory savers under every strategy: equal results, bit-equal without compilation, and less memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, worst
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from world import run_world

import disttrain

SEED, STEPS, LAYERS, WIDTH, HIDDEN, TIME, BATCH = 4, 3, 4, 32, 128, 32, 16
# Dropout is inside the blocks, so a recomputed forward must draw the same numbers as the first.
GPT = {"layers": LAYERS, "width": WIDTH, "hidden": HIDDEN, "heads": 2, "vocab": 11, "context": TIME, "dropout": 0.2}
CONFIG = {
    "run": {"seed": SEED, "steps": STEPS},
    "model": {"target": "gpt", "args": GPT},
    "objective": {"target": "next_token"},
    "optim": {"target": "torch.optim.SGD", "args": {"lr": 0.1, "momentum": 0.9}, "clip_norm": 0.5},
    "checkpoint": {"at_end": False},
}


class Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.arange(TIME + 1).mul(index + 3).remainder(11)
        return row[:-1], row[1:]


def train(folder: Path, cases: dict[str, list[str]], micro_batch: int) -> dict[str, Any]:
    """Losses and norms of each case, and the most memory that an accumulation added.

    The least of the steps counts, because the profiler does not see what gloo's threads free last.
    """
    found = {}
    for name, overrides in cases.items():
        where = [f"run.dir={folder}", f"run.name={name.replace('/', '-')}-{os.environ['WORLD_SIZE']}"]
        with disttrain.Engine(CONFIG, [*QUIET, *overrides, *where]) as engine:
            engine.prepare("model")
            losses, norms, peaks = [], [], []
            for step in engine.batches(Rows(), global_batch=BATCH, micro_batch=micro_batch):
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                    losses.append(engine.accumulate("model", step).loss)
                peaks.append(highest(seen))
                norms.append(engine.step("model").grad_norm)
                engine.log()
                if engine.should_stop():
                    break
            found[name] = losses, norms, min(peaks)
    return found


def highest(seen: Any) -> int:
    """The largest running sum of the bytes that torch's allocator allocated and freed."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1, ["none"]),
        (2, ["ddp", "fsdp", "zero3"]),
        pytest.param(
            2, [name for name in strategies_at(2) if name not in ("ddp", "fsdp", "zero3")], marks=pytest.mark.slow
        ),
    ],
)
def test_recomputing_changes_no_bit_and_saves_memory(size: int, names: list[str], tmp_path: Path) -> None:
    kinds = ("none", "full", "selective")
    cases = {f"{name}/{kind}": [*STRATEGIES[name], f"memory.recompute={kind}"] for name in names for kind in kinds}
    micro_batch = BATCH // size // 2
    found = run_world(size, train, tmp_path, cases, micro_batch)[0]
    # For all blocks except the one being recomputed: the results of its two largest products, which only `full` frees,
    # and silu's result and product, which `selective` frees too.
    product, rest = 4 * micro_batch * TIME * 2 * HIDDEN, 4 * micro_batch * TIME * 2 * HIDDEN
    for name in names:
        plain, full, selective = (found[f"{name}/{kind}"] for kind in kinds)
        assert full[:2] == plain[:2], name
        assert selective[:2] == plain[:2], name
        assert plain[2] - full[2] > (LAYERS - 1) * (product + rest), name
        assert plain[2] - selective[2] > (LAYERS - 1) * rest, name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line, self.dropout = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.sin(self.line(self.norm(x))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def train_small(folder: Path, cases: dict[str, list[str]]) -> dict[str, Any]:
    found = {}
    for name, overrides in cases.items():
        config = {"run": {"name": name.replace("/", "-"), "dir": str(folder), "seed": SEED, "steps": STEPS}}
        with disttrain.Engine(config, [*QUIET, *overrides]) as engine:
            engine.prepare("model", Small, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
            losses, norms = [], []
            for step in range(STEPS):
                x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
                mine = engine.micro_batches([x[engine.rank :: engine.world_size]])
                square = lambda model, x: (model(x).square().sum(), len(x))  # noqa: E731
                losses.append(engine.accumulate("model", mine, square).loss)
                norms.append(engine.step("model").grad_norm)
                engine.log()
            found[name] = losses, norms
    return found


COMPILED = {
    "plain": [],
    "compile": ["memory.compile=true"],
    "full": ["memory.compile=true", "memory.recompute=full"],
    "budget": ["memory.compile=true", "memory.recompute=budget", "memory.budget=0"],
}


@pytest.mark.parametrize(
    ("size", "names"),
    [
        pytest.param(2, ["fsdp"], marks=pytest.mark.slow),
        pytest.param(1, ["none"], marks=pytest.mark.slow),
        pytest.param(2, ["ddp"], marks=pytest.mark.slow),
    ]
    + [pytest.param(2, [f"zero{stage}"], marks=pytest.mark.slow) for stage in (1, 2, 3)],
)
def test_compiled_blocks_give_the_same_numbers_with_dropout(size: int, names: list[str], tmp_path: Path) -> None:
    cases = {f"{n}/{kind}": [*STRATEGIES[n], *more] for n in names for kind, more in COMPILED.items()}
    found = run_world(size, train_small, tmp_path, cases, timeout_s=500.0)[0]
    for name in names:
        for kind in ("compile", "full", "budget"):
            for one, plain in zip(found[f"{name}/{kind}"], found[f"{name}/plain"], strict=True):
                # Fused kernels round differently: float32's 1.2e-7 through three blocks.
                assert worst(one, plain) < 2e-6, (name, kind)
