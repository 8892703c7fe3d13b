"""Counts collectives as torch dispatches them: gradients are communicated once per optimizer step.

The expected numbers of elements, buckets and blocks are computed here from shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from world import run_world

import disttrain
from disttrain.strategy.step.step_sums import _fetch

LAYERS, WIDTH, HIDDEN, VOCAB = 3, 32, 128, 64
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN + 2 * WIDTH
ROOT = VOCAB * WIDTH + WIDTH
TENSORS = 9 * LAYERS + 2

CONFIG: dict[str, Any] = {
    "run": {"steps": 6},
    "model": {
        "target": "gpt",
        "args": {"layers": LAYERS, "width": WIDTH, "hidden": HIDDEN, "heads": 2, "vocab": VOCAB, "context": 8},
    },
    "objective": {"target": "next_token"},
    "optim": {"target": "torch.optim.AdamW", "args": {"lr": 1e-3}, "clip_norm": 1.0},
    "checkpoint": {"at_end": False},
    "report": {"every": 3, "progress": False, "plot": False},
}


class Counting(TorchDispatchMode):
    """Records (operation, dtype, elements of its largest tensor) of every collective that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=Tensor.numel)
            self.seen.append((func.name().split("::")[1].strip("_"), largest.dtype, largest.numel()))
        return func(*args, **(kwargs or {}))


class Tokens(torch.utils.data.Dataset[Any]):
    """Random rows. Their values do not matter."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.randint(VOCAB, (9,))
        return row[:-1], row[1:]


def count(folder: Path, cases: dict[str, tuple[dict[str, Any], int]]) -> dict[str, list[Any]]:
    """The collectives of each of a run's first five steps, by case: strategy section and accumulation."""
    found = {}
    for name, (sections, accumulation) in cases.items():
        run = {**CONFIG["run"], "name": name, "dir": str(folder)}
        with disttrain.Engine({**CONFIG, **sections, "run": run}) as engine:
            engine.prepare("model")
            batches = engine.batches(Tokens(), global_batch=accumulation * engine.world_size, micro_batch=1)
            steps = []
            for _ in range(5):
                with Counting() as counting:
                    engine.accumulate("model", next(batches))
                    engine.step("model")
                    engine.log()
                steps.append(counting.seen)
            batches.close()
        found[name] = steps
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases: dict[str, tuple[dict[str, Any], int]] = {}
    for accumulation in (1, 4):
        for clip in (1.0, None):
            optim = {**CONFIG["optim"], "clip_norm": clip}
            for name, options in (
                ("ddp", {"name": "ddp", "ddp": {"bucket_mb": 0.05}}),
                ("small", {"name": "ddp"}),
                ("fsdp", {"name": "fsdp", "fsdp": {"reduce": "last"}}),
            ):
                sections = {"strategy": options, "optim": optim}
                cases[f"{name}-{accumulation}-{'clip' if clip else 'free'}"] = sections, accumulation
    return run_world(2, count, tmp_path_factory.mktemp("runs"), cases)[0]


def buckets(limit: int) -> list[int]:
    """Elements of DDP's buckets. Tensors are in order, and a bucket closes when it has `limit` bytes or more."""
    block = [WIDTH, 3 * WIDTH * WIDTH, WIDTH * WIDTH, WIDTH, 2 * WIDTH * HIDDEN, WIDTH * HIDDEN]
    found, held = [], 0
    for size in [VOCAB * WIDTH, *block * LAYERS, WIDTH]:
        held += size
        if 4 * held >= limit:
            found.append(held)
            held = 0
    return [*found, held] if held else found


@pytest.mark.parametrize("clip", ["clip", "free"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("step", [1, 2, 3])  # the third step is reported, and all cost the same
def test_ddp_reduces_each_gradient_once_a_step(
    counted: dict[str, list[Any]], accumulation: int, clip: str, step: int
) -> None:
    seen = counted[f"ddp-{accumulation}-{clip}"][step]
    gradients = [size for kind, dtype, size in seen if dtype == torch.float32]
    assert sorted(gradients) == sorted(buckets(int(0.05 * 2**20)))
    assert sum(gradients) == LAYERS * BLOCK + ROOT
    # One collective finds the tensors that were reached (find_unused). The other is disttrain's single all-reduce.
    others = Counter((kind, dtype) for kind, dtype, _ in seen if dtype != torch.float32)
    assert others == {("allreduce", torch.int32): 1, ("allreduce", torch.float64): 1}


@pytest.mark.parametrize("clip", ["clip", "free"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_small_models_gradients_travel_with_the_steps_sums(
    counted: dict[str, list[Any]], accumulation: int, clip: str, step: int
) -> None:
    seen = counted[f"small-{accumulation}-{clip}"][step]
    assert seen == [("allreduce", torch.float64, 64 + LAYERS * BLOCK + ROOT)]


@pytest.mark.parametrize("clip", ["clip", "free"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_fsdp_reduces_each_group_once_a_step(
    counted: dict[str, list[Any]], accumulation: int, clip: str, step: int
) -> None:
    seen = counted[f"fsdp-{accumulation}-{clip}"][step]
    scattered = [size for kind, _, size in seen if kind == "reduce_scatter_base"]
    assert sorted(scattered) == sorted([BLOCK] * LAYERS + [ROOT])
    gathered = [size for kind, _, size in seen if kind == "allgather_base"]
    # Blocks are gathered for forward and backward of every micro-batch. The root stays gathered between micro-batches.
    assert Counter(gathered) == {BLOCK: 2 * LAYERS * accumulation, ROOT: accumulation}
    norms = int(clip == "clip" or step == 2)  # counted from zero: the third step is reported, with its norm
    small = [size for kind, dtype, size in seen if kind == "allreduce"]
    assert small == [64] + [1] * norms
    assert len(seen) == len(scattered) + len(gathered) + len(small)


def read_on_a_busy_gpu(folder: Path) -> tuple[list[float], bool]:
    """Returns numbers that NCCL summed, read while the GPU is busy for a second, and whether it was still busy then."""
    run = {**CONFIG["run"], "dir": str(folder), "device": "cuda"}
    with disttrain.Engine({**CONFIG, "run": run, "strategy": {"name": "ddp"}}) as engine:
        vector = torch.arange(64, dtype=torch.float64, device="cuda")
        read = _fetch(vector, engine.world.group.add_up(vector))
        torch.cuda._sleep(2_000_000_000)  # cycles
        ended = torch.cuda.current_stream().record_event()
        return read(), not ended.query()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_steps_sums_are_read_while_a_backward_runs(tmp_path: Path) -> None:
    assert run_world(1, read_on_a_busy_gpu, tmp_path) == [([float(number) for number in range(64)], True)]


def test_expected_sizes_are_those_of_the_model() -> None:
    """The sizes above are those of the trained model."""
    from disttrain.model import GPT

    model = GPT(**CONFIG["model"]["args"])
    sizes = [math.prod(parameter.shape) for parameter in model.parameters()]
    assert len(sizes) == TENSORS and sum(sizes) == LAYERS * BLOCK + ROOT
