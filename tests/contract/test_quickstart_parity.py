"""The quick start under every strategy on 1 to 4 ranks equals a plain loop over a separately written decoder.

Relative bounds: float32 2e-5, float64 1e-9; only the order of sums differs. AdamW turns the rounding error of a rare
byte into steps, so if the plain loop in float32 is further from float64, that distance is the bound.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import STRATEGIES, strategies_at, train_all
from plain import cosine_rates, plain_loop
from plain_gpt import PlainGPT, next_token_loss
from world import run_world

from disttrain.data import ByteText, Order

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
STEPS, WARMUP, PEAK, DECAY, SEED = 20, 20, 3e-3, 0.1, 1234
# The quick start's shape, reduced: the arithmetic is the same, and four ranks share two cores.
SMALL = [
    "run.steps=20",
    "model.args.layers=2",
    "model.args.width=32",
    "model.args.context=32",
    "eval.sets={}",
    "eval.every=null",
    "checkpoint.at_end=false",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real source files."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted((ROOT / "disttrain").rglob("*.py"))[:40]:
        (folder / path.name).write_text(path.read_text())
    return folder


def cases(text: Path, size: int, *, fp64: bool) -> dict[str, list[str]]:
    """Accumulation 1 and 3, a global batch that does not divide evenly, with and without clipping."""
    found: dict[str, list[str]] = {}
    for name in strategies_at(size, fp64=fp64):
        compute = f"precision.compute={'fp64' if fp64 else 'fp32'}"
        base = [*SMALL, f"data.train.args.source={text}", *STRATEGIES[name], compute]
        found[f"{name}/one"] = [*base, "data.micro_batch=null", "optim.clip_norm=0.5"]
        found[f"{name}/three"] = [*base, f"data.micro_batch={-(-32 // (3 * size))}", "optim.clip_norm=null"]
    return found


def reference(
    dataset: ByteText, first: dict[str, Any], *, layers: int = 2, clip: float | None, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Sample indices and initial weights are inputs. Nothing in disttrain computes here."""
    order = Order(len(dataset), SEED)
    position, epoch, steps = 0, 0, []
    for _ in range(STEPS):
        if position >= len(dataset):
            epoch, position = epoch + 1, 0
        count = min(32, len(dataset) - position)
        steps.append([dataset.gather_batch(order.indices(epoch, position, count).tolist())])
        position += count
    state = {name: torch.from_numpy(value).to(dtype) for name, value in first.items()}
    model = PlainGPT(state, layers=layers, heads=4, kv_heads=2).to(dtype)
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    rates = cosine_rates(PEAK, warmup=WARMUP, steps=STEPS)
    return plain_loop(model, torch.optim.AdamW(groups, lr=PEAK), steps, next_token_loss, rates=rates, clip=clip)


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4))])
@pytest.mark.parametrize("fp64", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "fp64"])
def test_equals_a_plain_loop(size: int, fp64: bool, text: Path, tmp_path: Path) -> None:
    found = run_world(size, train_all, CONFIG, tmp_path, cases(text, size, fp64=fp64))
    dtype, bound = (torch.float64, 1e-9) if fp64 else (torch.float32, 2e-5)
    first = found[0][f"{strategies_at(size)[0]}/one"]["first"]
    dataset = ByteText(str(text), 32, "train")
    clips = {"one": 0.5, "three": None}
    expected = {key: reference(dataset, first, clip=clip, dtype=dtype) for key, clip in clips.items()}

    @cache
    def exact(key: str) -> tuple[list[float], list[float]]:
        return reference(dataset, first, clip=clips[key], dtype=torch.float64)

    for name, run in found[0].items():
        key = name.split("/")[1]
        assert all((run["first"][key] == value).all() for key, value in first.items()), f"{name}: other initial weights"
        for kind, measure in enumerate(("losses", "norms")):
            for step, (ours, plain) in enumerate(zip(run[measure], expected[key][kind], strict=True)):
                off = abs(ours - plain)
                assert off <= bound * abs(plain) or off <= 2 * abs(plain - exact(key)[kind][step]), (
                    name,
                    measure,
                    step,
                )
        assert all(rank[name]["losses"] == run["losses"] for rank in found), f"{name}: ranks report different losses"
