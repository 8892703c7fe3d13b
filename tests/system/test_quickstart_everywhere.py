"""The quick start itself, whole, by the commands users type: torchrun at 1 to 4 processes under every strategy.

A long battery: `-m slow`. Each run equals one plain loop over a decoder written out by hand. Prints its figures, which
docs/parity.md records.
"""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], list[float]]:
    torch.manual_seed(SEED)
    first = GPT(layers=4, width=128, heads=4, kv_heads=2, context=128, vocab=256).state_dict()
    weights = {name: value.numpy() for name, value in first.items()}
    return reference(ByteText("python-stdlib", 128, "train"), weights, layers=4, clip=1.0, dtype=torch.float32)


def difference(run: Path, expected: tuple[list[float], list[float]], name: str) -> float:
    """The largest relative difference of losses and gradient norms over the steps; printed, for docs/parity.md."""
    loss, norm = (worst(list(column(run, key).values()), expected[k]) for k, key in enumerate(("loss", "grad_norm")))
    print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}")
    return max(loss, norm)


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "none"])
def test_under_torchrun(
    name: str, size: int, micro_batch: int, expected: tuple[list[float], list[float]], tmp_path: Path
) -> None:
    options = (*OPTIONS, *STRATEGIES[name], f"data.micro_batch={micro_batch}", f"run.dir={tmp_path}")
    torchrun(size, "configs/quickstart.yaml", *options, timeout_s=600)
    assert difference(only_run(tmp_path), expected, f"{name} at {size} rank(s), micro-batch {micro_batch}") < 2e-5


def test_under_plain_python(expected: tuple[list[float], list[float]], tmp_path: Path) -> None:
    plain("configs/quickstart.yaml", *OPTIONS, "strategy.name=none", f"run.dir={tmp_path}", timeout_s=600)
    assert difference(only_run(tmp_path), expected, "none") < 2e-5
