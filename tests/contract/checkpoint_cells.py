"""Defines the cells of the checkpoint matrix: who saves, who loads, and what one rank does in each.

A saver trains SAVED steps, saves, and trains to the end, which is the uninterrupted run. A loader loads that
checkpoint, saves it again at once in its own layout, and trains to the end from the checkpoint that it wrote.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from plain import cosine_rates, plain_loop

import disttrain
from disttrain.checkpoint import Checkpoint
from disttrain.testing.cases import BATCH, CLIP, MODELS, SAMPLES, SEED
from disttrain.testing.models import summed_loss
from disttrain.testing.reference import batches, build

SAVED, AFTER = 4, 5
STEPS = SAVED + AFTER
"""Epochs of three steps: saved after the first step of the second epoch."""

RATE, WARMUP = 3e-3, 3
PER_RANK = "user/disttrain/random/"
"""A row a rank of the world that saved: of another size the rows of the ranks that both worlds have are equal."""

ZERO = "strategy.name=deepspeed"
STRATEGIES: dict[str, tuple[list[str], tuple[int, ...], tuple[int, ...]]] = {
    "ddp": (["strategy.name=ddp"], (1, 2, 4), (1, 2, 3, 4)),
    "fsdp": (["strategy.name=fsdp"], (1, 2, 4), (1, 2, 3, 4)),
    "replicate": (["strategy.name=fsdp"], (2, 4), (2, 3, 4)),
    "tensor": (["strategy.name=fsdp", "mesh.tensor=2"], (2, 4), (2, 4)),
    "zero1": ([ZERO, "strategy.deepspeed.stage=1"], (1, 2, 4), (1, 2, 3, 4)),
    "zero2": ([ZERO, "strategy.deepspeed.stage=2"], (1, 2, 4), (1, 2, 3, 4)),
    "zero3": ([ZERO, "strategy.deepspeed.stage=3"], (1, 2, 4), (1, 2, 3, 4)),
}
"""name -> overrides, the worlds it saves in, the worlds it loads in. Two replicas, of three ranks three; tensor
parallelism of two leaves two shards at four ranks."""


@dataclass(frozen=True, order=True)
class Place:
    """A strategy and a world size."""

    strategy: str
    size: int

    @property
    def overrides(self) -> list[str]:
        """The overrides that a user writes after the config."""
        more = [f"mesh.replicate={3 if self.size == 3 else 2}"] if self.strategy == "replicate" else []
        return [*STRATEGIES[self.strategy][0], *more]

    def __str__(self) -> str:
        return f"{self.strategy} at {self.size}"


SAVERS = [Place(name, size) for name, (_, sizes, _) in STRATEGIES.items() for size in sizes]
LOADERS = [Place(name, size) for name, (_, _, sizes) in STRATEGIES.items() for size in sizes]


@dataclass
class Found:
    """The result of one cell: all differences in words, the tensor count, and the losses."""

    faults: list[str] = field(default_factory=list)
    tensors: int = 0
    losses: list[float] = field(default_factory=list)


def config(folder: Path, name: str) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(folder), "seed": SEED, "steps": STEPS, "device": "cpu", "timeout_s": 60},
        "model": MODELS["gpt"],
        "objective": {"target": "disttrain.testing.models:objective"},
        "data": {
            "train": {"target": "disttrain.testing.models:Sequences", "args": {"size": SAMPLES}},
            "global_batch": BATCH,
            "micro_batch": 7,
        },
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": RATE, "weight_decay": 0.1}, "clip_norm": CLIP},
        "schedule": {"target": "cosine", "args": {"warmup": WARMUP}},
        "checkpoint": {"at_end": False},
        "report": {"every": 1, "progress": False, "plot": False, "trackers": []},
    }


def losses_to_end(engine: Any, save_at: int | None = None) -> list[float]:
    """The losses of the remaining steps of the run."""
    losses = []
    for micro_batches in engine.batches():
        losses.append(engine.accumulate("model", micro_batches).loss)
        engine.step("model")
        engine.log()
        if engine.progress.steps == save_at:
            engine.save()
        if engine.should_stop():
            break
    return losses


def save_all(folder: Path, places: Sequence[Place]) -> dict[Place, list[float]]:
    """Run each of these savers on one rank. Returns the losses of the steps after its checkpoint."""
    found = {}
    for place in places:
        with disttrain.Engine(config(folder, str(place)), place.overrides) as engine:
            engine.prepare("model")
            found[place] = losses_to_end(engine, SAVED)[SAVED:]
    return found


def load_all(folder: Path, cells: Sequence[tuple[Place, Place]]) -> dict[tuple[Place, Place], Found]:
    """Run each of these (saver, loader) pairs on one rank. Rank 0 compares."""
    found = {}
    for saver, loader in cells:
        saved = checkpoint_of(folder, str(saver))
        name = f"{saver}, into {loader}"
        with disttrain.Engine(config(folder, name), loader.overrides) as engine:
            engine.prepare("model")
            engine.load(saved)
            again = engine.save()
            own = Found()
            if engine.rank == 0:
                own.faults, own.tensors = differences(saved, again)
            own.losses = losses_to_end(engine)
            found[saver, loader] = own
            main, run = engine.rank == 0, engine.folder
        if main:
            shutil.rmtree(run)
    return found


def checkpoint_of(folder: Path, name: str) -> Path:
    return folder / name / "checkpoints" / f"step-{SAVED:08d}"


def differences(first: Path, second: Path) -> tuple[list[str], int]:
    """Returns how two checkpoints differ: names, shapes, dtypes, bits, and the mesh-independent document."""
    a, b = Checkpoint.open(first), Checkpoint.open(second)
    faults = [f"{name} is in one only" for name in sorted(a.tensors.keys() ^ b.tensors.keys())]
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        one, other = a.read(name), b.read(name)
        if name.startswith(PER_RANK):
            ranks = min(len(one), len(other))
            one, other = one[:ranks], other[:ranks]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            faults.append(f"{name} is {one.dtype} {tuple(one.shape)}, then {other.dtype} {tuple(other.shape)}")
        elif not torch.equal(bits(one), bits(other)):
            faults.append(f"{name} differs in {int((bits(one) != bits(other)).sum())} bytes")
    for what in ("progress", "user"):
        if a.document[what] != b.document[what]:
            faults.append(f"{what} is {a.document[what]}, then {b.document[what]}")
    mine, theirs = (dict(one.document["optim"]["model"]) for one in (a, b))
    if groups(mine.pop("groups")) != groups(theirs.pop("groups")):
        faults.append("the settings of a parameter's group differ")
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            faults.append(f"optim {key} is {mine.get(key)}, then {theirs.get(key)}")
    return faults, len(a.tensors)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def groups(saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings of each parameter, because strategies may order and split groups differently."""
    return {
        name: {key: value for key, value in group.items() if key != "members"}
        for group in saved
        for name in group["members"]
    }


@cache
def plain_losses() -> list[float]:
    """Every step's loss by a plain PyTorch loop in one process."""
    model = build("gpt")
    # decay_vectors is off: matrices decay, vectors do not.
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    steps: Iterator[Any] = (batch for _, batch in zip(range(STEPS), batches(), strict=False))
    losses, _ = plain_loop(
        model,
        optimizer,
        [[batch] for batch in steps],
        lambda model, batch: summed_loss(model, batch, 0),
        rates=cosine_rates(RATE, warmup=WARMUP, steps=STEPS),
        clip=CLIP,
    )
    return losses
