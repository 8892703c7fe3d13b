"""The quick start on real GPUs with NCCL: every strategy, dtype and memory saver, compared with the CPU.

Skipped without CUDA. docs/measurements/hardware.md lists the hardware that was used.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launched import PROJECT, column, status, torchrun

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]

CONFIG = PROJECT / "configs" / "quickstart.yaml"
SHORT = (
    "run.steps=20",
    "run.threads=2",
    "model.args.context=64",
    "data.global_batch=16",
    "data.micro_batch=4",
    "eval.every=null",
    "eval.at_end=false",
    "report.every=1",
    "report.progress=false",
    "report.plot=false",
    "report.trackers=[]",
    "precision.compute=fp32",
    # a rate of 3e-3 amplifies rounding: on the CPU bf16 differs from float32 by 7e-3; at this rate, by 1.1e-4
    "optim.args.lr=1e-3",
)
STRATEGIES = {
    "ddp": ("strategy.name=ddp",),
    "fsdp": ("strategy.name=fsdp",),
    "fsdp-offload": ("strategy.name=fsdp", "strategy.fsdp.offload=true"),
    "zero1": ("strategy.name=deepspeed", "strategy.deepspeed.stage=1"),
    "zero2": ("strategy.name=deepspeed", "strategy.deepspeed.stage=2"),
    "zero2-offload": ("strategy.name=deepspeed", "strategy.deepspeed.stage=2", "strategy.deepspeed.offload=cpu"),
    "zero3": ("strategy.name=deepspeed", "strategy.deepspeed.stage=3"),
}
# float32 on a GPU sums in another order, and AdamW turns rounding into steps. This bounds 20 steps.
WIDE = 1e-3
# 8 (bf16) and 11 (fp16) significant bits per product: 2**-9 and 2**-12 rounding, averaged over many, of a loss near 4.
BOUNDS = {"fp32": WIDE, "bf16": 2e-2, "fp16": 1e-2}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Each step's loss on the CPU, in float32."""
    folder = tmp_path_factory.mktemp("cpu")
    torchrun(1, CONFIG, *SHORT, f"run.dir={folder}", "run.device=cpu", "strategy.name=none")
    return column(folder / "quickstart", "loss")


def differs(folder: Path, expected: dict[int, float], processes: int, *overrides: str) -> float:
    """The largest relative difference of a loss, over the steps of a run on `processes` GPUs."""
    torchrun(processes, CONFIG, *SHORT, f"run.dir={folder}", "run.device=cuda", *overrides)
    assert status(folder / "quickstart")["state"] == "finished"
    found = column(folder / "quickstart", "loss")
    assert found.keys() == expected.keys()
    return max(abs(found[step] - loss) / loss for step, loss in expected.items())


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_cpu(strategy: str, compute: str, expected: dict[int, float], tmp_path: Path) -> None:
    processes = min(GPUS, 2)
    overrides = (*STRATEGIES[strategy], f"precision.compute={compute}")
    assert differs(tmp_path, expected, processes, *overrides) < BOUNDS[compute]


SAVERS = {
    "compile": ["memory.compile=true"],
    "recompute": ["memory.recompute=full"],
    "selective": ["memory.recompute=selective"],
    "compile, budget": ["memory.compile=true", "memory.recompute=budget"],
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_memory_savers_change_no_number(saver: str, strategy: str, expected: dict[int, float], tmp_path: Path) -> None:
    assert differs(tmp_path, expected, min(GPUS, 2), *STRATEGIES[strategy], *SAVERS[saver]) < WIDE


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp-offload", "zero2", "zero3"])
def test_a_run_in_two_parts_equals_an_uninterrupted_run(strategy: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout drawn on the GPU and saves in the background."""
    own = ("run.device=cuda", "model.args.dropout=0.1", "checkpoint.every=5", "checkpoint.background=true")
    for name, ends in {"whole": (20,), "parts": (10, 20)}.items():
        for steps in ends:
            where = (f"run.dir={tmp_path}", f"run.name={name}", f"run.steps={steps}", "schedule=null")
            torchrun(1, CONFIG, *SHORT, *STRATEGIES[strategy], *own, *where)
    whole, parts = (column(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert len(whole) == 20
    assert parts == whole


def test_checkpoint_goes_from_gpu_to_cpu(expected: dict[int, float], tmp_path: Path) -> None:
    half = ("checkpoint.every=10", "run.device=cuda", "strategy.name=fsdp", "schedule=null")
    torchrun(1, CONFIG, *SHORT, *half, f"run.dir={tmp_path}", "run.steps=10")
    other = ("run.device=cpu", "strategy.name=none", "schedule=null")
    torchrun(1, CONFIG, *SHORT, *other, f"run.dir={tmp_path}", "run.steps=20")
    found = column(tmp_path / "quickstart", "loss")
    assert set(found) == set(expected)
    assert status(tmp_path / "quickstart")["step"] == 20
