"""Without torch's private names strategies train to equal losses, or are rejected by name.

Each private name is replaced by something that raises: alone, and all together. torch itself keeps them. Strategies
`none` and `ddp` always train.
"""

from __future__ import annotations

import ast
import importlib
import logging
import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain import torch_internals
from disttrain.config.schema import MemoryConfig
from disttrain.errors import LaunchError
from disttrain.strategy.memory_savers import save_memory

MODULES = [
    importlib.import_module(f"{torch_internals.__name__}.{module.name}")
    for module in pkgutil.iter_modules(torch_internals.__path__)
]

FSDP_ONLY = {
    "torch.distributed.fsdp._fully_shard._fsdp_state",
    "torch.distributed.fsdp._fully_shard._fsdp_param",
    "FSDPParam",
    "FSDPState",
    "_get_fsdp_state",
    "_fsdp_param_group",
    "_unsharded_param",
    "sharded_param",
    "unsharded_accumulated_grad",
    "reduce_dtype",
    "_version",
}
"""Names without a public alternative: strategy fsdp is rejected."""

NEEDED = {"fsdp": FSDP_ONLY, "deepspeed, stage 3": {"_version"}}
"""The names without which a strategy is rejected, by variation. Every other variation trains without any of them."""

BUDGET_ONLY = ("torch._inductor.compile_fx", "torch._functorch.config", "activation_memory_budget", "compile_fx")
"""Names without a public alternative that memory.recompute=budget needs, and nothing else."""


def looked_up() -> list[str]:
    """The private names in the package: the table of kernels, and the names passed to `private` and `reader`."""
    found = set(importlib.import_module(f"{torch_internals.__name__}.kernels")._LOOPS)
    for module in MODULES:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("private", "reader"):
                texts = (one.value for one in node.args if isinstance(one, ast.Constant))
                found.update(text for text in texts if isinstance(text, str))
    # Constants that reach a call through a variable.
    return sorted(found | FSDP_ONLY | {"compute_local_shape_and_global_offset", "_step_supports_amp_scaling"})


@contextmanager
def without(names: Collection[str]) -> Iterator[set[str]]:
    """Make those names raise inside the context.

    A function with an alternative raises when it is called, others at look-up. Yields the names that are looked up,
    replaced or not.
    """
    asked: set[str] = set()
    access = importlib.import_module(f"{torch_internals.__name__}.access")
    plain_private, plain_reader = access.private, access.reader

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("replaced by a test")

    def private(owner: Any, name: str, *default: Any) -> Any:
        asked.update({name, owner} if isinstance(owner, str) else {name})
        if isinstance(owner, str) and owner in names:
            raise ModuleNotFoundError(f"replaced by a test: {owner}")
        if name not in names:
            return plain_private(owner, name, *default)
        found = plain_private(owner, name, *default)
        if callable(found) and not isinstance(found, type) and name not in {*FSDP_ONLY, *BUDGET_ONLY}:
            return raises
        raise AttributeError(f"replaced by a test: {name}")

    def reader(*wanted: str) -> Callable[[Any], Any]:
        asked.update(wanted)
        return raises if set(wanted) & set(names) else plain_reader(*wanted)

    with mock.patch.multiple(access, private=private, reader=reader):
        patches = [
            mock.patch.object(module, name, replaced)
            for module in MODULES
            for name, replaced in (("private", private), ("reader", reader))
            if hasattr(module, name)
        ]
        for patch in patches:
            patch.start()
        forget_choices()
        try:
            yield asked
        finally:
            for patch in patches:
                patch.stop()
            forget_choices()


def forget_choices() -> None:
    """Make every choice between a private name and its public alternative again."""
    for module in MODULES:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


class Net(nn.Module):
    """With blocks, a batch norm that runs on one sample, dropout, and a parameter that no forward uses."""

    def __init__(self, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.1)
        self.unused, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(scale_shape))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.dropout(self.norm(x)) * self.scale


def squares(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return model(batch["x"]).square().sum(), len(batch["x"])


VARIATIONS: dict[str, dict[str, Any]] = {
    "none": {"strategy": {"name": "none"}},
    "none, fp64": {"strategy": {"name": "none"}, "precision": {"master": "fp64", "compute": "fp64", "reduce": "fp64"}},
    "ddp": {"strategy": {"name": "ddp"}},
    "ddp, in buckets": {"strategy": {"name": "ddp", "ddp": {"bucket_mb": 0.0001, "find_unused": True}}},
    "fsdp": {"strategy": {"name": "fsdp"}},
    **{
        f"deepspeed, stage {stage}": {
            "strategy": {"name": "deepspeed", "deepspeed": {"stage": stage}},
            "model": {"target": Net, "args": {"scale_shape": (1,)}},  # DeepSpeed does not accept 0-d parameters
        }
        for stage in (1, 3)
    },
}


def losses(folder: Path, sections: dict[str, Any]) -> list[float]:
    """Three steps of the AdamW kernel, with accumulation, clipping and a schedule."""
    config = {
        "run": {"name": "run", "dir": str(folder), "steps": 4, "device": "cpu"},
        "model": {"target": Net},
        "objective": {"target": lambda: squares},
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.05}, "clip_norm": 0.5},
        "schedule": {"target": "cosine", "args": {"warmup": 2}},
        "checkpoint": {"at_end": False},
        "report": {"progress": False, "plot": False},
        **sections,
    }
    data = [{"x": row} for row in torch.randn(64, 6, generator=torch.Generator().manual_seed(0))]
    found = []
    with disttrain.Engine(config) as engine:
        engine.prepare("model")
        for micro_batches in engine.batches(data, global_batch=16, micro_batch=4):
            found.append(engine.accumulate("model", micro_batches).loss)
            engine.step("model")
            engine.log()
            if engine.should_stop():
                break
        found += [float(tensor.double().sum()) for tensor in engine.full_weights("model").values()]
        engine.strategy.shards(engine._prepared["model"])
    return found


def compare(folder: Path, variations: list[str]) -> list[str]:
    """Runs on every rank. Returns the failures: a variation, the names it lacked, and what happened."""
    logging.getLogger("disttrain").setLevel(logging.ERROR)
    wrong, known, trials = [], set(looked_up()), count()
    for variation in variations:
        with without([]) as asked:
            expected = losses(folder / f"{next(trials)}", VARIATIONS[variation])
        if unknown := asked - known:
            wrong.append(f"{variation} asks for {unknown}, which looked_up does not list")
        if variation == "fsdp" and not asked >= FSDP_ONLY:
            wrong.append(f"fsdp never asks for {FSDP_ONLY - asked}")
        singles = [[name] for name in sorted(asked)]
        if variation.startswith("deepspeed"):  # which starts more slowly; the other strategies try each name
            singles = [["_version"], sorted(known - {"_version"})]
        needed, name = NEEDED.get(variation, set()), variation.split(",")[0]
        for absent in [*singles, sorted(known)]:
            with without(absent):
                try:
                    found: Any = losses(folder / f"{next(trials)}", VARIATIONS[variation])
                except Exception as error:  # noqa: BLE001 - reported with its variation
                    found = error
            if needed & set(absent):
                if not isinstance(found, LaunchError) or f"Cannot use strategy {name}" not in str(found):
                    wrong.append(f"{variation} without {absent}: {found!r}, not rejected by name")
            elif found != expected:
                wrong.append(f"{variation} without {absent}: {found!r}, not {expected}")
    return wrong


WORLDS = [
    (1, ["none", "none, fp64"]),
    (2, ["ddp", "ddp, in buckets", "fsdp"]),
    (2, ["deepspeed, stage 1", "deepspeed, stage 3"]),
]


@pytest.mark.parametrize(("size", "variations"), WORLDS)
def test_losses_are_equal_with_the_public_alternatives(size: int, variations: list[str], tmp_path: Path) -> None:
    for wrong in run_world(size, compare, tmp_path, variations, timeout_s=550.0):
        assert wrong == []


def test_names_are_enumerated() -> None:
    names = set(looked_up())
    assert {"_foreach_norm", "_fused_adamw_", "torch._utils", "_global_optimizer_pre_hooks", "_get_root_mesh"} <= names
    assert len(names) > 30


@pytest.mark.parametrize("name", BUDGET_ONLY)
def test_a_memory_budget_is_rejected_by_name(name: str) -> None:
    memory = MemoryConfig(recompute="budget", compile=True, budget=0.5)
    with without([name]), pytest.raises(LaunchError, match=r"Cannot use memory\.recompute=budget"):
        save_memory(Net(), memory)
