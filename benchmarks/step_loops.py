"""The contestants of `step.py`: the same model, data, optimizer, schedule, clipping and report, in five loops.

Those that leave a model behind, which holds the process group, return it: `measure` lets go of it.
"""

from __future__ import annotations

import math
import os
import time
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
from benchmarks.step import BATCH, CLIP, LEARNING_RATE, REPORT, SAMPLES

WARM = 20
"""Steps that are not counted."""
WIDTH, CLASSES = 64, 10


def world_size() -> int:
    """Processes of this world."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Clock:
    """Called at each loss: the main thread's CPU time and the wall's, in ns."""

    def __init__(self) -> None:
        self.ticks: list[tuple[int, int]] = []

    def tick(self) -> None:
        """Note the time."""
        self.ticks.append((time.thread_time_ns(), time.perf_counter_ns()))

    def per_step_us(self, steps: int) -> tuple[float, float]:
        """A step's cost after the warm ones: the lower quartile over spans of ten steps, of which one is reported.

        What another process on the machine costs falls on some spans and not on others.
        """
        assert len(self.ticks) == WARM + steps + 1, f"{len(self.ticks)} calls for {steps} steps"
        marks = self.ticks[WARM::REPORT]
        found = []
        for kind in (0, 1):
            spans = sorted(later[kind] - mark[kind] for mark, later in pairwise(marks))
            found.append(spans[len(spans) // 4] / REPORT / 1e3)
        return found[0], found[1]


class Block(nn.Module):
    """Two linear layers around an activation, added to what came in: four tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.relu(self.up(x)))
        return y


class Net(nn.Module):
    """12 tensors: an entrance, two blocks, a head. 242: sixty blocks and a head."""

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
    """Tensors in memory, gathered a batch at a time."""

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
        """The batch of these samples."""
        where = torch.from_numpy(indices)
        return self.inputs[where], self.targets[where]


def schedule_factor(step: int, total: int) -> float:
    """Half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


def _plain_parts(tensors: int, steps: int) -> tuple[Net, Any]:
    torch.manual_seed(0)
    total = WARM + steps + 1
    return Net(tensors), lambda step: schedule_factor(step, total)


def _plain_batches(steps: int) -> Any:
    """This rank's part of a shuffled global batch, epoch after epoch."""
    data, generator = Samples(), torch.Generator().manual_seed(1)
    rank, size = int(os.environ.get("RANK", 0)), world_size()
    taken = 0
    while True:
        order = torch.randperm(SAMPLES, generator=generator)
        for start in range(0, SAMPLES, BATCH * size):
            if taken == WARM + steps + 1:
                return
            taken += 1
            where = order[start + rank * BATCH : start + (rank + 1) * BATCH]
            yield data.inputs[where], data.targets[where]


# ---------------------------------------------------------------------- by hand


def raw(strategy: str, tensors: int, steps: int, folder: str, clock: Clock) -> Any:
    """Plain PyTorch, written for speed."""
    if strategy != "none":
        dist.init_process_group("gloo")
    net, factor = _plain_parts(tensors, steps)
    model: nn.Module = net
    if strategy == "ddp":
        model = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    if strategy == "fsdp":
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net, reshard_after_forward=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    schedule = LambdaLR(optimizer, factor)
    Path(folder).mkdir(exist_ok=True)
    with Path(folder, f"{os.environ.get('RANK', 0)}.txt").open("w") as log:
        running = torch.zeros(())
        for step, (inputs, targets) in enumerate(_plain_batches(steps)):
            clock.tick()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            running += loss.detach()
            if step % REPORT == 0:
                if strategy != "none":
                    dist.all_reduce(running)
                log.write(f"{step} {float(running) / REPORT} {float(norm)} {schedule.get_last_lr()[0]}\n")
                running = torch.zeros(())
    if strategy != "none":
        dist.destroy_process_group()
    return model


# ---------------------------------------------------------------------- disttrain


def _config(strategy: str, tensors: int, steps: int, folder: str, clock: Clock) -> dict[str, Any]:
    def objective(model: Any, batch: Any) -> tuple[Tensor, int]:
        clock.tick()
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)

    return {
        "run": {"name": Path(folder).name, "dir": str(Path(folder).parent), "steps": WARM + steps + 1},
        "model": {"target": Net, "args": {"tensors": tensors}},
        "objective": {"target": lambda: objective},
        "data": {
            "train": {"target": Samples},
            "global_batch": BATCH * world_size(),
            "micro_batch": BATCH,
        },
        "optim": {
            "target": torch.optim.AdamW,
            "args": {"lr": LEARNING_RATE, "weight_decay": 0.1},
            "decay_vectors": True,
            "clip_norm": CLIP,
        },
        "schedule": {"target": "cosine"},
        "strategy": {"name": strategy, "ddp": {"find_unused": False}},
        "checkpoint": {"every": 100_000, "at_end": False},
        "report": {"every": REPORT, "progress": False, "plot": False},
    }


def own_loop(strategy: str, tensors: int, steps: int, folder: str, clock: Clock) -> None:
    """A user's loop over the public Engine."""
    with disttrain.Engine(_config(strategy, tensors, steps, folder, clock)) as engine:
        engine.prepare("model")
        for micro_batches in engine.batches():
            engine.accumulate("model", micro_batches)
            engine.step("model")
            engine.log()
            if engine.should_stop():
                break


def train(strategy: str, tensors: int, steps: int, folder: str, clock: Clock) -> None:
    """The loop of `disttrain.run`."""
    disttrain.train(_config(strategy, tensors, steps, folder, clock))


# ---------------------------------------------------------------------- others


def accelerate(strategy: str, tensors: int, steps: int, folder: str, clock: Clock) -> Any:
    """Hugging Face accelerate, on the CPU."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
    net, factor = _plain_parts(tensors, steps)
    adam = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    model, optimizer, schedule = accelerator.prepare(net, adam, LambdaLR(adam, factor))
    running = torch.zeros(())
    for step, (inputs, targets) in enumerate(_plain_batches(steps)):
        with accelerator.accumulate(model):
            clock.tick()
            loss = F.cross_entropy(model(inputs), targets)
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


def fabric(strategy: str, tensors: int, steps: int, folder: str, clock: Clock) -> Any:
    """Lightning Fabric, on the CPU."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy

    size = world_size()
    os.environ.update(NODE_RANK="0")
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    if strategy == "ddp":
        chosen = DDPStrategy(
            cluster_environment=LightningEnvironment(), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    runner = Fabric(accelerator="cpu", devices=size if strategy == "ddp" else 1, strategy=chosen)
    runner.launch()
    net, factor = _plain_parts(tensors, steps)
    adam = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    schedule = LambdaLR(adam, factor)
    model, optimizer = runner.setup(net, adam)
    running = torch.zeros(())
    for step, (inputs, targets) in enumerate(_plain_batches(steps)):
        clock.tick()
        loss = F.cross_entropy(model(inputs), targets)
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
