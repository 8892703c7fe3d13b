"""Writes checkpoints of other libraries in real worlds of torch DCP and DeepSpeed, with their expected content."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 3
Told = dict[str, dict[str, Any]]
"""By parameter or buffer, its `value` and each key of the optimizer's state, whole, as arrays."""


class Small(nn.Module):
    """Nothing divides evenly. One weight has two names, one is frozen, one buffer counts."""

    def __init__(self, vocab: int = 11, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.rise = nn.Linear(width, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.norm = nn.BatchNorm1d(7)
        self.fall = nn.Linear(7, width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [batch] to logits [batch, vocab]."""
        x = self.embed(tokens)
        logits: Tensor = self.head(x + self.fall(self.norm(self.frozen(torch.tanh(self.rise(x))))))
        return logits


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, and vectors without decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]


def batch(step: int) -> Tensor:
    """Other token ids on every rank and step."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(0, 11, (6,), generator=generator)


@contextmanager
def process_group() -> Iterator[None]:
    """Gloo, as set by the launcher's environment."""
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_arrays(found: Mapping[str, Mapping[str, Tensor]]) -> Told:
    """The tensors on rank 0, as arrays that processes can exchange."""
    if dist.get_rank():
        return {}
    return {
        name: {
            key: (value.float() if value.dtype is torch.bfloat16 else value).numpy().copy()
            for key, value in entry.items()
        }
        for name, entry in found.items()
    }


def write_dcp(folder: Path, kind: str, state_of_its_own: bool = False) -> Told:
    """Train with `ddp` or `fsdp` and save with torch.distributed.checkpoint. Returns what rank 0 gathered."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard

    with process_group():
        torch.manual_seed(1)
        model: Any = Small()
        if kind == "fsdp":
            for part in (model.rise, model.fall, model):
                fully_shard(part)
        else:
            model = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(grouped(model), lr=0.01)
        for step in range(STEPS):
            tokens = batch(step)
            nn.functional.cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        for buffer in model.buffers():  # of values that differ between ranks, DCP keeps those of some rank
            dist.broadcast(buffer, 0)
        saved, held = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": saved, "optim": held, "extra": {"step": STEPS, "note": "hello"}}
        if state_of_its_own:
            state = dict(model.state_dict())
        dcp.save(state, checkpoint_id=str(folder))
        whole, told = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        found: dict[str, dict[str, Tensor]] = {name: {"value": value} for name, value in whole.items()}
        for name, entry in told["state"].items():
            found[name] |= entry  # type: ignore[arg-type]
        return as_arrays(found)


def write_deepspeed_stages(root: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Told]:
    """Train with DeepSpeed's loop, one case (arguments of `write_deepspeed`) after the other.

    Saves each with `save_checkpoint` into a folder named after the case. Returns the content of each, as DeepSpeed
    reports it.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    import deepspeed.ops

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})  # compiles nothing
    with process_group():
        return {name: write_deepspeed(root / name, **case) for name, case in cases.items()}


def write_deepspeed(
    folder: Path, *, stage: int, optimizer: str = "adamw", zero: Mapping[str, Any] | None = None, bf16: bool = False
) -> Told:
    """Write one checkpoint in an existing world. `zero` extends its zero_optimization."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(1)
    model = Small().bfloat16() if bf16 else Small()
    made: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    options = {"lr": 0.01} | ({} if optimizer == "adamw" else {"momentum": 0.9})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=made(grouped(model), **options),
        config={
            "train_micro_batch_size_per_gpu": 6,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000}
            | dict(zero or {}),
            "bf16": {"enabled": bf16},
        },
        dist_init_required=False,
    )
    for step in range(STEPS):
        tokens = batch(step)
        engine.backward(nn.functional.cross_entropy(engine(tokens).float(), tokens))
        engine.step()
    engine.save_checkpoint(str(folder), tag="global_step3")
    if stage < 3:  # DeepSpeed 0.19 links state to parameters at the first group's step, before others have any
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    keys = ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ("momentum_buffer",)
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = {"value": safe_get_full_fp32_param(parameter)}
            found[name] |= {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                found[name] = {"value": parameter.detach().clone()}
    found |= {name: {"value": buffer} for name, buffer in model.named_buffers()}
    return as_arrays(found)
