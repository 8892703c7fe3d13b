"""The contract suite over every strategy: a covering sample in CI, everything with `-m slow`.

`python -m pytest -m slow -s tests/contract/test_strategies.py` prints the tables of docs/measurements/contract.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from disttrain.testing import StrategyContract

AWKWARD = ("tied-frozen", "unused", "odd")
ALL = ("gpt", *AWKWARD)


@dataclass(frozen=True)
class Variation:
    """A strategy with options, and where it runs. `at` adds overrides in a world of that size."""

    overrides: tuple[str, ...]
    sizes: tuple[int, ...] = (1, 2, 3, 4)
    models: tuple[str, ...] = ALL
    precisions: tuple[str, ...] = ("fp32", "fp64", "bf16")
    at: Mapping[int, tuple[str, ...]] | None = None


def zero(stage: int, *more: str) -> Variation:
    """DeepSpeed, which keeps its master weights in at most float32."""
    name = ("strategy.name=deepspeed", f"strategy.deepspeed.stage={stage}")
    return Variation((*name, *(f"strategy.deepspeed.{one}" for one in more)), precisions=("fp32", "bf16"))


def mesh(*sizes: int, **degrees: int) -> dict[int, tuple[str, ...]]:
    """The same mesh degrees in a world of each size."""
    return {size: tuple(f"mesh.{axis}={degree}" for axis, degree in degrees.items()) for size in sizes}


FSDP = ("strategy.name=fsdp",)
VARIATIONS = {
    "None": Variation(("strategy.name=none",), sizes=(1,)),
    "DDP": Variation(("strategy.name=ddp",)),
    "DDPBuckets": Variation(("strategy.name=ddp", "strategy.ddp.bucket_mb=0.0001")),
    "FSDP": Variation(FSDP),
    "FSDPReplicate": Variation(FSDP, sizes=(2, 3, 4), at=mesh(2, 4, replicate=2) | mesh(3, replicate=3)),
    "FSDPTensor": Variation(FSDP, sizes=(2, 4), at=mesh(2, 4, tensor=2)),
    "FSDPOffload": Variation((*FSDP, "strategy.fsdp.offload=true")),
    "ZeRO1": zero(1),
    "ZeRO2": zero(2),
    "ZeRO3": zero(3),
    "ZeRO2Offload": zero(2, "offload=cpu"),
    "ZeRO3Offload": zero(3, "offload=cpu", "offload_parameters=cpu"),
}


LONG = ("FSDPOffload", "ZeRO2Offload", "ZeRO3Offload")
"""Left out of CI, where tests/contract/test_deepspeed.py covers offload."""


FOUR = ("DDPBuckets",)
"""Run at four ranks in CI, too. The others are sampled at one to three ranks, with the same cases."""


def contract(name: str, variation: Variation, *, whole: bool) -> type[StrategyContract]:
    """The tests of one strategy: all cases, or a sample that differs from strategy to strategy."""

    class Contract(StrategyContract):
        @classmethod
        def overrides_at(cls, size: int) -> Sequence[str]:
            return (*cls.overrides, *(variation.at or {}).get(size, ()))

    for attribute in ("overrides", "models", "precisions"):
        setattr(Contract, attribute, getattr(variation, attribute))
    Contract.sizes = variation.sizes if whole or name in FOUR else tuple(size for size in variation.sizes if size < 4)
    Contract.every_case, Contract.turn = whole, list(VARIATIONS).index(name)
    Contract.timeout_s = 7000.0 if whole else 600.0
    Contract.__name__ = Contract.__qualname__ = f"Test{name}{'Whole' if whole else ''}"
    if whole:
        return pytest.mark.slow(pytest.mark.timeout(7200)(Contract))
    return pytest.mark.slow(Contract) if name in LONG else Contract


for _name, _variation in VARIATIONS.items():
    for _whole in (False, True):
        _contract = contract(_name, _variation, whole=_whole)
        globals()[_contract.__name__] = _contract
del _contract
