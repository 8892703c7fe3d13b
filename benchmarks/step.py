"""What a training step costs beside a hand-written PyTorch loop: disttrain, and accelerate and Fabric where installed.

    python benchmarks/step.py [--rounds 5] [--steps 200] [--tensors 12 242] [--strategies none ddp fsdp]
    python benchmarks/step.py --device cuda --tensors 12 242 gpt

In every round each contestant builds its model, optimizer, schedule and data and takes the same number of steps, in a
world of its own (where a process's code and data come to lie changes its speed by a tenth, and torch's own rendezvous
serves a process once), in an order that is rotated from round to round. What is compared is the time from one call of
the loss to the next: data, forward, backward, clipping, step, schedule, and every tenth step a report; in CPU time of
the main thread, and on the wall. The ratio is to the raw loop of the same round.

The raw loop is what a careful engineer writes: fused AdamW, `zero_grad(set_to_none=True)`, `clip_grad_norm_`, LambdaLR,
data gathered by index from tensors in memory, the loss added up on the device and read every tenth step only. Under ddp
buckets that gradients are views of, no buffer broadcasts, no search for unused parameters; under fsdp `fully_shard` on
every block and on the root, which is not resharded after its forward.
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

LEARNING_RATE, CLIP, REPORT = 1e-3, 1.0, 10


def contestants(strategy: str, device: str) -> dict[str, Callable[..., Any]]:
    """Those that are installed, by name; each takes a task and a clock."""
    from importlib.util import find_spec

    from benchmarks import step_loops as loops

    found: dict[str, Callable[..., Any]] = {"raw": loops.raw, "Engine": loops.own_loop, "train": loops.train}
    if strategy != "fsdp" and device == "cpu":  # neither shards on a CPU; on a GPU we race the raw loop alone
        found |= {"accelerate": loops.accelerate} if find_spec("accelerate") else {}
        found |= {"Fabric": loops.fabric} if find_spec("lightning_fabric") else {}
    return found


def measure(name: str, strategy: str, work: str, device: str, steps: int, folder: str) -> tuple[float, float]:
    """Microseconds a step, (main-thread CPU, wall), of one contestant on this rank. Collective."""
    from benchmarks.step_loops import Clock, Task

    clock = Clock()
    kept = contestants(strategy, device)[name](Task(strategy, work, device, steps, folder), clock)
    found = clock.per_step_us(steps)
    time.sleep(0.1)  # torch 2.13: a DDP that goes while gloo's thread still has its last tensor waits for ever
    del kept
    return found


def rows(found: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """The table's rows: medians over the rounds of the cost, of what is above raw's of the round, of the ratio."""
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
    """Race, and print one Markdown table a strategy and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tensors", nargs="+", default=["12", "242"], help="how many the model has; or gpt, for a GPU")
    parser.add_argument("--strategies", nargs="+", choices=["none", "ddp", "fsdp"], default=["none", "ddp", "fsdp"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="on one GPU, a world is of one rank")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for strategy in given.strategies:
        for tensors in given.tensors:
            size = 1 if strategy == "none" or given.device == "cuda" else 2
            with tempfile.TemporaryDirectory() as folder:
                names = list(contestants(strategy, given.device))
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
                for turn in (number % len(names) for number in range(given.rounds)):
                    for name in names[turn:] + names[:turn]:
                        place = f"{folder}/{len(found[name])}-{name}"
                        task = (strategy, tensors, given.device, given.steps, place)
                        found[name].append(run_ranks(size, measure, name, *task)[0])
            what = tensors if tensors == "gpt" else f"{tensors} tensors"
            print(f"\n{strategy}, {what}, {size} rank(s) on {given.device}; medians of {given.rounds} rounds\n")
            print("| loop | CPU us a step | over raw | ratio | wall us a step | over raw | ratio |")
            print("|---|---:|---:|---:|---:|---:|---:|")
            print("\n".join(rows(found)), flush=True)


if __name__ == "__main__":
    main()
