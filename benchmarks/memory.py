"""Measures the memory per rank of every strategy on CPU processes, and compares it with `memory_formula`.

    python benchmarks/memory.py [--model deep|wide|third|small] [--world-size 4] [CASE ...]

Starts one world of gloo processes for each case, traces construction and some steps, and prints one Markdown table. The
first step creates optimizer state; from the third step on, all memory has been allocated.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import memory_formula as formula
from benchmarks.ranks import run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "deep": {"layers": 14, "width": 512, "heads": 8, "vocab": 8192, "context": 8, "tied": True},
    "wide": {"layers": 3, "width": 768, "heads": 8, "vocab": 16384, "context": 8, "tied": False},
    "third": {"layers": 8, "width": 640, "heads": 8, "vocab": 12288, "context": 8, "tied": False},
    "small": {"layers": 6, "width": 192, "heads": 4, "vocab": 4096, "context": 8, "tied": True},
}
"""50 M parameters in two very different shapes, a third shape the formula was not fitted to, and 3.4 M for tests."""

STEPS = 6
"""The last four steps count, because from the third step on all memory has been allocated."""

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": {"name": "ddp"}},
    "ddp, 2 micro-batches": {"strategy": {"name": "ddp"}, "accumulation": 2},
    "fsdp": {"strategy": {"name": "fsdp"}},
    "fsdp, reshard=false": {"strategy": {"name": "fsdp", "fsdp": {"reshard": False}}},
    "fsdp, 2 micro-batches, reduce=last": {
        "strategy": {"name": "fsdp", "fsdp": {"reduce": "last"}},
        "accumulation": 2,
    },
    "fsdp, 2 micro-batches, reduce=every": {
        "strategy": {"name": "fsdp", "fsdp": {"reduce": "every"}},
        "accumulation": 2,
    },
    "fsdp, mesh.replicate=2": {"strategy": {"name": "fsdp"}, "mesh": {"replicate": 2}},
    "deepspeed 1": {"strategy": {"name": "deepspeed", "deepspeed": {"stage": 1}}},
    "deepspeed 2": {"strategy": {"name": "deepspeed", "deepspeed": {"stage": 2}}},
    "deepspeed 3": {"strategy": {"name": "deepspeed", "deepspeed": {"stage": 3}}},
}


def expect(model: dict[str, Any], case: dict[str, Any], world_size: int) -> formula.Peak:
    """Returns the formula's prediction for a case. Needs no process group."""
    shapes, strategy = shapes_of(model), case["strategy"]
    accumulation = case.get("accumulation", 1)
    options = strategy.get(strategy["name"], {})
    if strategy["name"] == "ddp":
        return formula.ddp(shapes)
    if strategy["name"] == "fsdp":
        shards = world_size // case.get("mesh", {}).get("replicate", 1)
        every = options.get("reduce") == "every"
        reshard = options.get("reshard", True)
        return formula.fsdp(shapes, shards=shards, reshard=reshard, accumulation=accumulation, every=every)
    bucket = int(options.get("bucket_mb", 25.0) * 2**20 / 4)
    return formula.zero(shapes, stage=options["stage"], ranks=world_size, bucket=bucket)


def shapes_of(model: dict[str, Any]) -> formula.Shapes:
    """Returns the shapes of our GPT that the formula needs."""
    width, layers, vocab = model["width"], model["layers"], model["vocab"]
    hidden = -(-8 * width // (3 * 64)) * 64
    parameters: dict[str, tuple[int, ...]] = {"tokens.weight": (vocab, width)}
    for layer in range(layers):
        parameters |= {
            f"blocks.{layer}.attention_norm.weight": (width,),
            **{f"blocks.{layer}.attention.{part}.weight": (width, width) for part in "qkv"},
            f"blocks.{layer}.attention.out.weight": (width, width),
            f"blocks.{layer}.swiglu_norm.weight": (width,),
            f"blocks.{layer}.swiglu.gate.weight": (hidden, width),
            f"blocks.{layer}.swiglu.up.weight": (hidden, width),
            f"blocks.{layer}.swiglu.down.weight": (width, hidden),
        }
    parameters["norm.weight"] = (width,)
    if not model["tied"]:
        parameters["head.weight"] = (vocab, width)
    return formula.Shapes(
        parameters,
        tuple(f"blocks.{layer}" for layer in range(layers)),
        head="tokens.weight" if model["tied"] else "head.weight",
        tied=model["tied"],
        activations=formula.gpt_activations(tokens=model["context"], layers=layers, width=width, hidden=hidden),
    )


def measure(model: dict[str, Any], case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Returns the bytes of one rank: peaks of construction and of a step, and the memory before a step. Collective."""
    import torch

    import disttrain
    from benchmarks.memory_trace import MemoryTrace, count_every_thread

    class Tokens(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = torch.randint(model["vocab"], (model["context"] + 1,))
            return tokens[:-1], tokens[1:]

    accumulation = case.get("accumulation", 1)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = {
        "run": {"name": "memory", "dir": folder, "steps": STEPS},
        "model": {"target": "gpt", "args": model},
        "objective": {"target": "next_token"},
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": 1e-4}, "clip_norm": 1.0},
        "strategy": case["strategy"],
        "mesh": case.get("mesh", {}),
        "checkpoint": {"at_end": False},
        "report": {"every": 100, "progress": False, "plot": False},
    }
    count_every_thread()
    peaks = []
    with disttrain.Engine(config) as engine:
        with (trace := MemoryTrace()), trace.part("construction"):
            engine.prepare("model")
        built = trace.window("construction")
        batches = engine.batches(Tokens(), global_batch=accumulation * world_size, micro_batch=1)
        for number in range(STEPS):
            micro_batches = next(batches)
            with (steps := MemoryTrace()), steps.part("step"):
                engine.accumulate("model", micro_batches)
                engine.step("model")
            step = steps.window("step")
            if number >= 2:
                peaks.append(step.peak_bytes - built.begin_bytes)
            engine.log()
        batches.close()
    held = step.begin_bytes - built.begin_bytes
    return {"construction": built.peak_bytes - built.begin_bytes, "held": held, "peaks": peaks}


def run_case(model: dict[str, Any], case: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Runs `measure` in a new world and returns the result of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(world_size, measure, model, case, folder)


def settled_peak(ranks: list[dict[str, Any]]) -> float:
    """Bytes of the median step, of the rank with most: in some steps one of gloo's threads frees its copy late."""
    return max(median(rank["peaks"]) for rank in ranks)


def main() -> None:
    """Measure the named cases, or all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="deep")
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--terms", action="store_true", help="show the formula's terms too")
    parser.add_argument("cases", nargs="*", default=list(CASES))
    given = parser.parse_args()
    model = MODELS[given.model]
    print(f"{shapes_of(model).numel() / 1e6:.1f} M parameters, {given.world_size} ranks; MB per rank, largest rank\n")
    print("| case | a step's peak | formula | difference | highest step | between steps | construction |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in given.cases:
        expected = expect(model, CASES[name], given.world_size)
        ranks = run_case(model, CASES[name], given.world_size)
        peak = settled_peak(ranks)
        highest = max(peak for rank in ranks for peak in rank["peaks"])
        held, built = (max(rank[key] for rank in ranks) for key in ("held", "construction"))
        off = peak / expected.bytes - 1
        row = f"{peak / 1e6:.1f} | {expected.bytes / 1e6:.1f} | {off:+.1%}"
        row += f" | {highest / 1e6:.1f} | {held / 1e6:.1f} | {built / 1e6:.1f}"
        print(f"| {name} | {row} |", flush=True)
        if given.terms:
            terms = ", ".join(f"{key} {value * 4 / 1e6:.1f}" for key, value in expected.terms.items() if value)
            print(f"  {expected.moment}: {terms}; ranks {ranks}")


if __name__ == "__main__":
    main()
