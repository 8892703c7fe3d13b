"""What is run: models, optimizers, accumulation, clipping and precision, all of it or a sample. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

SEED, STEPS, SAMPLES, BATCH = 11, 20, 70, 26
"""An epoch is batches of 26, 26 and 18: none divides by three or four ranks, and the last is short."""

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
"""Below the norms of most steps of every model: clipping happens."""


@dataclass(frozen=True)
class Case:
    """One run of STEPS steps. `accumulation` is how many micro-batches a rank has of a full batch."""

    model: str
    optimizer: str
    accumulation: int
    clip: float | None
    precision: str = "fp32"

    @property
    def group(self) -> str:
        """Model and precision: what a test is named for."""
        return f"{self.model}-{self.precision}"

    def __str__(self) -> str:
        micro = "one micro-batch" if self.accumulation == 1 else f"{self.accumulation} micro-batches"
        clip = f"clipped at {self.clip}" if self.clip else "not clipped"
        return f"model {self.model}, {self.optimizer}, {micro}, {clip}, {self.precision}"


_CORNERS = (("adamw", 1, CLIP), ("sgd", 3, None), ("adamw", 3, None), ("sgd", 1, CLIP))
"""Every optimizer, accumulation and clip twice, every pair of their values at least once."""

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
        for precision in ("fp64", "bf16")
        for model in MODELS
        for optimizer, accumulation, clip in (("adamw", 3, CLIP), ("sgd", 1, None))
    ),
)


def sample(size: int, sizes: Sequence[int], turn: int = 0, models: Sequence[str] = tuple(MODELS)) -> tuple[Case, ...]:
    """Some of EVERY for a world of `size`: over all `sizes` each model comes in float32, each optimizer, accumulation
    and clip, float64 and bf16; no size is left out. Another `turn` deals other cases to other sizes."""
    place = sizes.index(size)
    found = []
    for number in range(max(len(models), len(sizes), len(_CORNERS))):
        if number % len(sizes) == place:
            corner = _CORNERS[(number + turn) % len(_CORNERS)]
            found.append(Case(models[(number + turn) % len(models)], *corner))
    wide = Case(models[(place + turn + 1) % len(models)], "adamw", 3, CLIP, "fp64")
    narrow = Case(models[(place + turn + 2) % len(models)], "sgd", 1, None, "bf16")
    return (*found, wide, narrow)
