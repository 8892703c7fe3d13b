"""Runs the complete quick start by the commands that users type, on 1 to 4 processes under every strategy.

A long battery (`-m slow`). Each run equals one plain loop over a separately written decoder. Prints the figures of
docs/reference/parity.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from contract.engine_runs import STRATEGIES, worst
from contract.test_quickstart_parity import SEED, reference
from launched import column, only_run, plain, torchrun

from disttrain.data import ByteText
from disttrain.model import GPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
OPTIONS = ("run.steps=20", "report.every=1", "report.progress=false", "eval.at_end=false", "checkpoint.at_end=false")


Numbers = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Plain:
    """Losses and gradient norms by step in float64, and the largest distance of the same loop in float32 from them.

    At this rate, chance turns a rounding into 1e-4 within the last of twenty steps: 7e-5 or 9e-5 for the plain loop,
    depending on its threads. One measurement does not bound another, so the bound is twice the distance.
    """

    exact: Numbers
    rounding: float


@pytest.fixture(scope="module")
def expected() -> Plain:
    torch.manual_seed(SEED)
    first = GPT(layers=4, width=128, heads=4, kv_heads=2, context=128, vocab=256).state_dict()
    weights = {name: value.numpy() for name, value in first.items()}
    data = ByteText("python-stdlib", 128, "train")
    exact, single = (
        reference(data, weights, layers=4, clip=1.0, dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    return Plain(exact, max(map(worst, single, exact)))


def is_near(run: Path, expected: Plain, name: str) -> bool:
    """Whether losses and gradient norms are near the exact ones, for float32. Printed for docs/reference/parity.md."""
    found = [list(column(run, key).values()) for key in ("loss", "grad_norm")]
    loss, norm = map(worst, found, expected.exact)
    print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}; the plain loop {expected.rounding:.1e}")
    return max(loss, norm) < max(2e-5, 2 * expected.rounding)


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "none"])
def test_under_torchrun(name: str, size: int, micro_batch: int, expected: Plain, tmp_path: Path) -> None:
    options = (*OPTIONS, *STRATEGIES[name], f"data.micro_batch={micro_batch}", f"run.dir={tmp_path}")
    torchrun(size, "configs/quickstart.yaml", *options, timeout_s=600)
    assert is_near(only_run(tmp_path), expected, f"{name} at {size} rank(s), micro-batch {micro_batch}")


def test_under_plain_python(expected: Plain, tmp_path: Path) -> None:
    plain("configs/quickstart.yaml", *OPTIONS, "strategy.name=none", f"run.dir={tmp_path}", timeout_s=600)
    assert is_near(only_run(tmp_path), expected, "none")
