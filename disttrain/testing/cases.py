"""Defines the contract cases: model, optimizer, accumulation, clipping and precision, all of them or a sample. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

SEED, STEPS, SAMPLES, BATCH = 11, 20, 70, 26
"""An epoch has batches of 26, 26 and 18 samples. None is divisible by three or four ranks, and the last is short."""

_HOME = "disttrain.testing.models"
MODELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt": {
            "target": "gpt",
            "args": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 8, "vocab": 12},
        },
        "tied-frozen": {"target": f"{_HOME}:TiedFrozen"},
        "unused": {"target": f"{_HOME}:Unused"},
        "odd": {"target": f"{_HOME}:Odd"},
    }
)
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "adamw": {"target": "torch.optim.AdamW", "args": {"lr": 3e-3, "weight_decay": 0.1}},
        "sgd": {"target": "torch.optim.SGD", "args": {"lr": 0.1, "momentum": 0.9}},
    }
)
CLIP = 0.5
"""Below the gradient norm of most steps of every model, so that clipping happens."""


@dataclass(frozen=True)
class Case:
    """One run of STEPS steps. `accumulation` is the number of micro-batches that a rank has of a full batch."""

    model: str
    optimizer: str
    accumulation: int
    clip: float | None
    precision: str = "fp32"

    @property
    def group(self) -> str:
        """Model and precision, which name a test."""
        return f"{self.model}-{self.precision}"

    def __str__(self) -> str:
        micro = "one micro-batch" if self.accumulation == 1 else f"{self.accumulation} micro-batches"
        clip = f"clipped at {self.clip}" if self.clip else "not clipped"
        return f"model {self.model}, {self.optimizer}, {micro}, {clip}, {self.precision}"


_CORNERS = (("adamw", 1, CLIP), ("sgd", 3, None), ("adamw", 3, None), ("sgd", 1, CLIP))
"""Every optimizer, accumulation and clipping twice, and every pair of their values at least once."""

_OTHER = {
    "fp64": (("adamw", 3, CLIP), ("sgd", 1, None)),
    # SGD is clipped, because the bounds are for rounding errors, not for what momentum makes of them without clipping.
    "bf16": (("adamw", 3, None), ("sgd", 1, CLIP)),
}

EVERY: tuple[Case, ...] = (
    *(
        Case(model, optimizer, accumulation, clip)
        for model in MODELS
        for optimizer in OPTIMIZERS
        for accumulation in (1, 3)
        for clip in (CLIP, None)
    ),
    *(
        Case(model, optimizer, accumulation, clip, precision)
        for precision, corners in _OTHER.items()
        for model in MODELS
        for optimizer, accumulation, clip in corners
    ),
)


def sample(size: int, sizes: Sequence[int], turn: int = 0, models: Sequence[str] = tuple(MODELS)) -> tuple[Case, ...]:
    """Returns a sample of EVERY for a world of `size`.

    Over all `sizes`, the samples cover each model in float32, each optimizer, accumulation and clipping, float64 and
    bf16. Another `turn` assigns other cases to the sizes.
    """
    place = sizes.index(size)
    found = []
    for number in range(max(len(models), len(sizes), len(_CORNERS))):
        if number % len(sizes) == place:
            corner = _CORNERS[(number + turn) % len(_CORNERS)]
            found.append(Case(models[(number + turn) % len(models)], *corner))
    wide = Case(models[(place + turn + 1) % len(models)], *_OTHER["fp64"][0], "fp64")
    narrow = Case(models[(place + turn + 2) % len(models)], *_OTHER["bf16"][1], "bf16")
    return (*found, wide, narrow)
