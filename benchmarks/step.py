"""Compares the cost of a training step with a hand-written PyTorch loop.

The loops are disttrain's, and those of accelerate and Lightning Fabric if they are installed.

    python benchmarks/step.py [--rounds 5] [--steps 200] [--tensors 12 242] [--strategies none ddp fsdp]
    python benchmarks/step.py --device cuda --tensors 12 242 gpt

In every round each loop builds its model, optimizer, schedule and data and runs the same number of steps. Each loop
runs in new processes, because the memory layout of a process changes its speed by a tenth, and because torch's
rendezvous works once per process. The order of the loops rotates from round to round. The measured time runs from one
call of the loss to the next: data, forward, backward, clipping, step, schedule, and a report every tenth step. It is
given as CPU time of the main thread and as wall-clock time, with the ratio to the raw loop of the same round.

The raw loop is what a careful engineer writes: fused AdamW, `zero_grad(set_to_none=True)`, `clip_grad_norm_`, LambdaLR,
data gathered by index from tensors in memory, and a loss that is summed on the device and read every tenth step only.
Under ddp, gradients are views of the buckets, buffers are not broadcast, and unused parameters are not searched for.
Under fsdp, `fully_shard` wraps every block and the root, and the root is not resharded after its forward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.ranks import run_ranks


def installed_loops(strategy: str, device: str) -> dict[str, Callable[..., Any]]:
    """Returns the installed loops by name. Each takes a task and a clock."""
    from importlib.util import find_spec

    from benchmarks import step_loops as loops

    found: dict[str, Callable[..., Any]] = {"raw": loops.raw, "Engine": loops.engine_loop, "train": loops.train}
    if strategy != "fsdp" and device == "cpu":  # neither shards on a CPU; on a GPU only the raw loop is compared
        found |= {"accelerate": loops.accelerate} if find_spec("accelerate") else {}
        found |= {"Fabric": loops.fabric} if find_spec("lightning_fabric") else {}
    return found


def measure(name: str, strategy: str, work: str, device: str, steps: int, folder: str) -> tuple[float, float]:
    """Returns microseconds per step (main-thread CPU, wall clock) of one loop on this rank. Collective."""
    from benchmarks.step_loops import Clock, Task

    clock = Clock()
    kept = installed_loops(strategy, device)[name](Task(strategy, work, device, steps, folder), clock)
    found = clock.per_step_us(steps)
    time.sleep(0.1)  # torch 2.13: a DDP that is destroyed while gloo's thread holds its last tensor never returns
    del kept
    return found


def rows(found: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """Yields the rows of the table: medians over the rounds of the cost, of the excess over raw, and of the ratio."""
    for name, times in found.items():
        cells = []
        for kind in (0, 1):
            own = [time[kind] for time in times]
            base = [time[kind] for time in found["raw"]]
            over = statistics.median(a - b for a, b in zip(own, base, strict=True))
            ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
            cells += [f"{statistics.median(own):.0f}", f"{over:+.0f}", f"{ratio:.3f}"]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measures the loops and prints one Markdown table for each strategy and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tensors", nargs="+", default=["12", "242"], help="tensors of the model, or gpt for a GPU")
    parser.add_argument("--strategies", nargs="+", choices=["none", "ddp", "fsdp"], default=["none", "ddp", "fsdp"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="one GPU runs one rank")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for strategy in given.strategies:
        for tensors in given.tensors:
            size = 1 if strategy == "none" or given.device == "cuda" else 2
            with tempfile.TemporaryDirectory() as folder:
                names = list(installed_loops(strategy, given.device))
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
                for turn in (number % len(names) for number in range(given.rounds)):
                    for name in names[turn:] + names[:turn]:
                        place = f"{folder}/{len(found[name])}-{name}"
                        task = (strategy, tensors, given.device, given.steps, place)
                        found[name].append(run_ranks(size, measure, name, *task)[0])
            what = tensors if tensors == "gpt" else f"{tensors} tensors"
            print(f"\n{strategy}, {what}, {size} rank(s) on {given.device}; medians of {given.rounds} rounds\n")
            print("| loop | CPU us/step | over raw | ratio | wall us/step | over raw | ratio |")
            print("|---|---:|---:|---:|---:|---:|---:|")
            print("\n".join(rows(found)), flush=True)


if __name__ == "__main__":
    main()
