"""The contract suite on GPUs with NCCL, compared with the plain loop on the CPU.

Uses as many ranks as there are GPUs. DeepSpeed, which starts slowly, runs a sample of the cases. Skipped without CUDA;
docs/measurements/hardware.md lists the hardware that was used.
"""

from __future__ import annotations

import pytest
import torch

from disttrain.testing import StrategyContract

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ZERO = "strategy.name=deepspeed"
VARIATIONS = {
    "None": ("strategy.name=none",),
    "DDP": ("strategy.name=ddp",),
    "DDPBuckets": ("strategy.name=ddp", "strategy.ddp.bucket_mb=0.0001"),
    "FSDP": ("strategy.name=fsdp",),
    "FSDPOffload": ("strategy.name=fsdp", "strategy.fsdp.offload=true"),
    "ZeRO1": (ZERO, "strategy.deepspeed.stage=1"),
    "ZeRO2": (ZERO, "strategy.deepspeed.stage=2"),
    "ZeRO3": (ZERO, "strategy.deepspeed.stage=3"),
    "ZeRO2Offload": (ZERO, "strategy.deepspeed.stage=2", "strategy.deepspeed.offload=cpu"),
}


def contract(name: str, overrides: tuple[str, ...]) -> type[StrategyContract]:
    """The tests of one strategy on GPUs."""

    class Contract(StrategyContract):
        sizes = tuple(range(1, (1 if name == "None" else max(1, min(GPUS, 4))) + 1))
        precisions = ("fp32", "bf16") if ZERO in overrides else ("fp32", "fp64", "bf16")

    Contract.every_case, Contract.turn = ZERO not in overrides, list(VARIATIONS).index(name)
    Contract.overrides = (*overrides, "run.device=cuda")
    Contract.__name__ = Contract.__qualname__ = f"TestGPU{name}"
    return pytest.mark.gpu(pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")(Contract))


for _name, _overrides in VARIATIONS.items():
    globals()[f"TestGPU{_name}"] = contract(_name, _overrides)
