"""Every strategy with a torch optimizer steps by the fused kernel, bit-equal to `Optimizer.step`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from world import run_world

import disttrain
from disttrain.strategy.step.fused_adam import FusedAdam

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": {"name": "ddp"}},
    "ddp, in buckets": {"strategy": {"name": "ddp", "ddp": {"bucket_mb": 0.0001}}},
    "fsdp": {"strategy": {"name": "fsdp"}},
    "fsdp, offloaded": {"strategy": {"name": "fsdp", "fsdp": {"offload": True}}},
    "fsdp, two replicas": {"strategy": {"name": "fsdp"}, "mesh": {"replicate": 2, "shard": 1}},
}


class Net(nn.Module):
    """Odd sizes, with parameters of which one rank of two holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 1)])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x * self.scale


def squares(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    return model(batch).square().sum(), len(batch)


def train(
    folder: Path, sections: dict[str, Any], *, watched: bool, batch: int = 8, device: str = "cpu"
) -> tuple[dict[str, Tensor], int]:
    """Returns the weights after six steps, and how many of the steps the kernel took."""
    config = {
        "run": {"name": "run", "dir": str(folder), "steps": 6, "device": device},
        "model": {"target": Net},
        "objective": {"target": lambda: squares},
        # Gradients are scaled by a power of two, which is exact at any point of the computation.
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.05}},
        "schedule": {"target": "cosine", "args": {"warmup": 2}},
        "checkpoint": {"at_end": False},
        "report": {"progress": False, "plot": False},
        **sections,
    }
    data = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    counted = mock.patch.object(FusedAdam, "step", autospec=True, side_effect=FusedAdam.step)
    with disttrain.Engine(config) as engine, counted as steps:
        engine.prepare("model")
        prepared = engine._prepared["model"]
        assert isinstance(prepared.optimizer, Optimizer)
        if watched:
            prepared.optimizer.register_step_post_hook(lambda *_: None)
        for micro_batches in engine.batches(data, global_batch=batch, micro_batch=2):
            engine.accumulate("model", micro_batches)
            engine.step("model")
            engine.log()
            if engine.should_stop():
                break
        return engine.full_weights("model"), steps.call_count


def check(folder: Path, sections: dict[str, Any], device: str = "cpu") -> None:
    """On every rank the kernel takes five steps of six, because the first one creates the optimizer's state.

    The bits are equal.
    """
    by_kernel, taken = train(folder / "kernel", sections, watched=False, device=device)
    by_step, none = train(folder / "step", sections, watched=True, device=device)
    assert (taken, none) == (5, 0)
    for key, value in by_step.items():
        assert torch.equal(by_kernel[key], value), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks(name: str, tmp_path: Path) -> None:
    run_world(2, check, tmp_path, STRATEGIES[name])


def digest(folder: Path) -> str:
    """A digest of the weights of one of two replicas.

    A hook watches only the first. No power of two scales gradients.
    """
    weights, _ = train(folder, STRATEGIES["fsdp, two replicas"], watched=os.environ["RANK"] == "0", batch=6)
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()


def test_replicas_stay_equal_when_one_is_watched(tmp_path: Path) -> None:
    first, second = run_world(2, digest, tmp_path)
    assert first == second


def test_one_rank(tmp_path: Path) -> None:
    check(tmp_path, {"strategy": {"name": "none"}})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ddp", "ddp, in buckets", "fsdp", "fsdp, offloaded"])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    run_world(1, check, tmp_path, STRATEGIES[name], "cuda")
