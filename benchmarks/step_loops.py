"""The five loops that `step.py` compares, with the same model, data, optimizer, schedule, clipping and report.

A loop whose model holds the process group returns the model, so that `measure` decides when to destroy it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import disttrain
from disttrain.model import GPT

LEARNING_RATE, CLIP, REPORT = 1e-3, 1.0, 10
WARM = 20
"""Warm-up steps, which are not measured."""
WIDTH, CLASSES, BATCH, SAMPLES = 64, 10, 32, 4096
CONTEXT, VOCAB = 1024, 50304


def world_size() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Clock:
    """Records the CPU time of the main thread and the wall-clock time, in ns, at each call of the loss."""

    def __init__(self) -> None:
        self.ticks: list[tuple[int, int]] = []

    def tick(self) -> None:
        """Records the current time."""
        self.ticks.append((time.thread_time_ns(), time.perf_counter_ns()))

    def per_step_us(self, steps: int) -> tuple[float, float]:
        """Returns the cost of a step after the warm-up: the lower quartile over spans of ten steps.

        The quartile leaves out the spans that other processes on the machine slowed down.
        """
        assert len(self.ticks) == WARM + steps + 1, f"{len(self.ticks)} calls for {steps} steps"
        marks = self.ticks[WARM::REPORT]
        found = []
        for kind in (0, 1):
            spans = sorted(later[kind] - mark[kind] for mark, later in pairwise(marks))
            found.append(spans[len(spans) // 4] / REPORT / 1e3)
        return found[0], found[1]


class Block(nn.Module):
    """A residual block of two linear layers around an activation: four tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.relu(self.up(x)))
        return y


class Net(nn.Module):
    """12 tensors: a first layer, two blocks and a head. 242 tensors: sixty blocks and a head."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        blocks, odd = divmod(tensors - 2, 4)
        self.entrance = nn.Linear(WIDTH, WIDTH) if odd else nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entrance(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class Samples(torch.utils.data.Dataset[Any]):
    """Tensors in memory, gathered batch by batch."""

    draws_randomness = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
        self.targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def gather_batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Returns the batch of these samples."""
        where = torch.from_numpy(indices)
        return self.inputs[where], self.targets[where]


class Tokens(Samples):
    """Sequences of random tokens with next-token targets."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCAB, (SAMPLES, CONTEXT + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True)
class Task:
    """The work of a loop: `steps` measured steps in `folder`.

    `work` is the number of tensors of `Net`, or `gpt`: 124 million parameters and 8 x 1024 tokens per rank and step, in
    bf16 by autocast, for a GPU.
    """

    strategy: str
    work: str
    device: str
    steps: int
    folder: str

    @property
    def taken(self) -> int:
        """All steps: the warm-up, the measured steps, and one more, whose start ends the last measured step."""
        return WARM + self.steps + 1

    @property
    def batch(self) -> int:
        """Samples per rank and step."""
        return 8 if self.work == "gpt" else BATCH

    @property
    def model(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """The class of the model and its arguments."""
        if self.work == "gpt":
            return GPT, {"layers": 12, "width": 768, "heads": 12, "context": CONTEXT, "vocab": VOCAB}
        return Net, {"tensors": int(self.work)}

    @property
    def samples(self) -> type[Samples]:
        """The class of the data."""
        return Tokens if self.work == "gpt" else Samples

    def computing(self) -> AbstractContextManager[Any]:
        """Returns the context manager for a forward."""
        return torch.autocast(self.device, torch.bfloat16) if self.work == "gpt" else nullcontext()


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def schedule_factor(step: int, total: int) -> float:
    """Returns the factor of a half-cosine schedule."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


def _plain_parts(task: Task) -> tuple[nn.Module, Callable[[int], float]]:
    torch.manual_seed(0)
    make, args = task.model
    return make(**args).to(task.device), lambda step: schedule_factor(step, task.taken)


def _plain_batches(task: Task) -> Any:
    """Yields this rank's part of each shuffled global batch, epoch after epoch."""
    data, generator = task.samples(), torch.Generator().manual_seed(1)
    rank, size = int(os.environ.get("RANK", 0)), world_size()
    taken = 0
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data), task.batch * size):
            if taken == task.taken:
                return
            taken += 1
            where = order[start + rank * task.batch : start + (rank + 1) * task.batch]
            yield tuple(_to(task.device, one[where]) for one in (data.inputs, data.targets))


def _to(device: str, batch: Tensor) -> Tensor:
    return batch if device == "cpu" else batch.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------- plain PyTorch


def raw(task: Task, clock: Clock) -> Any:
    """Trains in plain PyTorch, written for speed."""
    if task.strategy != "none":
        place = {} if world_size() > 1 else {"init_method": "tcp://127.0.0.1:0", "rank": 0, "world_size": 1}
        dist.init_process_group("gloo" if task.device == "cpu" else "nccl", **place)
    net, factor = _plain_parts(task)
    model: nn.Module = net
    if task.strategy == "ddp":
        model = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    if task.strategy == "fsdp":
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net, reshard_after_forward=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    schedule = LambdaLR(optimizer, factor)
    Path(task.folder).mkdir(exist_ok=True)
    with Path(task.folder, f"{os.environ.get('RANK', 0)}.txt").open("w") as log:
        running = torch.zeros((), device=task.device)
        for step, (inputs, targets) in enumerate(_plain_batches(task)):
            clock.tick()
            with task.computing():
                loss = cross_entropy(model(inputs), targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            running += loss.detach()
            if step % REPORT == 0:
                if task.strategy != "none":
                    dist.all_reduce(running)
                log.write(f"{step} {float(running) / REPORT} {float(norm)} {schedule.get_last_lr()[0]}\n")
                running = torch.zeros((), device=task.device)
    if task.strategy != "none":
        dist.destroy_process_group()
    return model


# ---------------------------------------------------------------------- disttrain


def _config(task: Task, clock: Clock) -> dict[str, Any]:
    def objective(model: Any, batch: Any) -> tuple[Tensor, int]:
        clock.tick()
        inputs, targets = batch
        return cross_entropy(model(inputs), targets, reduction="sum"), targets.numel()

    make, args = task.model
    folder = Path(task.folder)
    return {
        "run": {"name": folder.name, "dir": str(folder.parent), "steps": task.taken, "device": task.device},
        "model": {"target": make, "args": args},
        "objective": {"target": lambda: objective},
        "data": {
            "train": {"target": task.samples},
            "global_batch": task.batch * world_size(),
            "micro_batch": task.batch,
        },
        "optim": {
            "target": torch.optim.AdamW,
            "args": {"lr": LEARNING_RATE, "weight_decay": 0.1},
            "decay_vectors": True,
            "clip_norm": CLIP,
        },
        "schedule": {"target": "cosine"},
        "strategy": {"name": task.strategy, "ddp": {"find_unused": False}},
        "precision": {"compute": "bf16" if task.work == "gpt" else "fp32"},
        "checkpoint": {"every": 100_000, "at_end": False},
        "report": {"every": REPORT, "progress": False, "plot": False},
    }


def engine_loop(task: Task, clock: Clock) -> None:
    """Trains with a custom loop over the public Engine."""
    with disttrain.Engine(_config(task, clock)) as engine:
        engine.prepare("model")
        for micro_batches in engine.batches():
            engine.accumulate("model", micro_batches)
            engine.step("model")
            engine.log()
            if engine.should_stop():
                break


def train(task: Task, clock: Clock) -> None:
    """Trains with the loop of `disttrain.run`."""
    disttrain.train(_config(task, clock))


# ---------------------------------------------------------------------- other libraries


def accelerate(task: Task, clock: Clock) -> Any:
    """Trains with Hugging Face accelerate on the CPU."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
    net, factor = _plain_parts(task)
    adam = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    model, optimizer, schedule = accelerator.prepare(net, adam, LambdaLR(adam, factor))
    running = torch.zeros(())
    for step, (inputs, targets) in enumerate(_plain_batches(task)):
        with accelerator.accumulate(model):
            clock.tick()
            loss = cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            running += loss.detach()
            if step % REPORT == 0:
                accelerator.reduce(running).item()
                running = torch.zeros(())
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    return model


def fabric(task: Task, clock: Clock) -> Any:
    """Trains with Lightning Fabric on the CPU."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy

    size = world_size()
    os.environ.update(NODE_RANK="0")
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    if task.strategy == "ddp":
        chosen = DDPStrategy(
            cluster_environment=LightningEnvironment(), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    runner = Fabric(accelerator="cpu", devices=size if task.strategy == "ddp" else 1, strategy=chosen)
    runner.launch()
    net, factor = _plain_parts(task)
    adam = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    schedule = LambdaLR(adam, factor)
    model, optimizer = runner.setup(net, adam)
    running = torch.zeros(())
    for step, (inputs, targets) in enumerate(_plain_batches(task)):
        clock.tick()
        loss = cross_entropy(model(inputs), targets)
        runner.backward(loss)
        runner.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.detach()
        if step % REPORT == 0:
            runner.all_reduce(running).item()
            running = torch.zeros(())
    if dist.is_initialized():
        dist.destroy_process_group()
    return model
