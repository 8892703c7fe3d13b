"""Summarizes a run's folder as one JSON object, and that object as text for a terminal.

Owns the wording of `disttrain report`. Reads the folder only, so the run may still be training. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from disttrain.report.display import amount
from disttrain.report.plot import curve_of, evaluation_losses
from disttrain.report.run_folder import RunFolder

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def summarize_run(folder: RunFolder) -> dict[str, Any]:
    """Return state, losses (first, best, last), last evaluations, median rates and events, as JSON values."""
    lines = folder.read_metrics()
    ledger = folder.read_ledger()
    status = folder.read_status() or {}
    steps = [line for line in lines if "loss" in line or "strategy" in line]
    last = steps[-1] if steps else {}
    return {
        "run": folder.path.absolute().name,
        "path": str(folder.path),
        "state": status.get("state"),
        "exit_code": status.get("exit_code"),
        "reason": status.get("reason"),
        "step": max((int(line.get("step", 0)) for line in lines), default=status.get("step", 0)),
        "total_steps": next((one["total_steps"] for one in reversed(ledger) if one.get("total_steps")), None),
        "samples": last.get("samples"),
        "tokens": last.get("tokens"),
        "strategy": last.get("strategy"),
        "world_size": last.get("world_size"),
        "losses": {key: _loss(lines, key) for key in ("loss", *evaluation_losses(lines)) if curve_of(lines, key)[0]},
        "evaluation": _last_evaluation(lines),
        "rates": _rates(steps),
        "nonfinite_lines": sum(1 for line in lines if line.get("nonfinite")),
        "events": dict(Counter(str(one.get("event")) for one in ledger)),
        "incidents": [one for one in ledger if one.get("event") in ("incident", "failed", "checkpoint_rejected")],
    }


def _loss(lines: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    steps, values = curve_of(lines, key)
    best = min(range(len(values)), key=values.__getitem__)
    return {
        "first": values[0],
        "last": values[-1],
        "last_step": int(steps[-1]),
        "best": values[best],
        "best_step": int(steps[best]),
        "curve": _thinned(values, _WIDTH),
    }


def _last_evaluation(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("eval/"):
                found[key] = value if isinstance(value, int | float) and math.isfinite(value) else None
    return found


def _rates(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median rates and the memory peak. One checkpoint or the warm-up hardly changes a median."""
    found = {}
    for key in ("step_time_s", "data_time_s", "samples_per_s", "tokens_per_s", "mfu"):
        values = curve_of(steps, key)[1]
        if values:
            found[key] = statistics.median(values)
    peaks = curve_of(steps, "mem_peak_bytes")[1]
    if peaks:
        found["mem_peak_bytes"] = max(peaks)
    return found


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """Return at most `most` values: the means of consecutive parts of nearly equal length."""
    count = min(len(values), most)
    edges = [index * len(values) // count for index in range(count + 1)]
    return [statistics.fmean(values[start:stop]) for start, stop in pairwise(edges)]


# ---------------------------------------------------------------------- text


def render_summary(summary: Mapping[str, Any]) -> str:
    """Return the summary as text, without a newline at the end."""
    blocks = [_head(summary), _losses(summary["losses"])]
    others = {key: value for key, value in summary["evaluation"].items() if not key.endswith("/loss")}
    if others:
        width = max(map(len, others))
        blocks.append(
            [f"{key:<{width}}  {'not finite' if one is None else f'{one:.4g}'}" for key, one in others.items()]
        )
    blocks += [_speed(summary["rates"]), _troubles(summary)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _head(summary: Mapping[str, Any]) -> list[str]:
    of = f"/{summary['total_steps']}" if summary["total_steps"] else ""
    parts = [f"{summary['run']}: {summary['state'] or 'no status'}", f"step {summary['step']}{of}"]
    if summary["strategy"]:
        ranks = summary["world_size"]
        parts.append(f"{summary['strategy']} on {ranks} rank{'' if ranks == 1 else 's'}")
    if summary["tokens"]:
        parts.append(f"{amount(summary['tokens'])} tokens")
    elif summary["samples"]:
        parts.append(f"{amount(summary['samples'])} samples")
    lines = [", ".join(parts)]
    if summary["reason"]:
        lines.append(f"  because: {summary['reason']}")
    return lines


def _losses(losses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not losses:
        return ["no finite loss was reported"]
    width = max(map(len, losses))
    lines = [f"{'':<{width}}  {'first':>9}  {'last':>9}  {'best':>9}  at step"]
    for key, one in losses.items():
        numbers = f"{one['first']:>9.4g}  {one['last']:>9.4g}  {one['best']:>9.4g}  {one['best_step']:>7}"
        lines.append(f"{key:<{width}}  {numbers}  {sparkline(one['curve'])}".rstrip())
    return lines


def sparkline(values: Sequence[float]) -> str:
    """Return one block character for each value, from lowest to highest; empty for a single value."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def _speed(rates: Mapping[str, float]) -> list[str]:
    parts = []
    if "step_time_s" in rates:
        share = rates.get("data_time_s", 0.0) / rates["step_time_s"] if rates["step_time_s"] else 0.0
        parts.append(f"{rates['step_time_s'] * 1000:.4g} ms per step ({share:.0%} waiting for data)")
    if rates.get("tokens_per_s"):
        parts.append(f"{amount(rates['tokens_per_s'])} tokens/s")
    elif rates.get("samples_per_s"):
        parts.append(f"{amount(rates['samples_per_s'])} samples/s")
    if "mfu" in rates:
        parts.append(f"mfu {rates['mfu']:.1%}")
    if "mem_peak_bytes" in rates:
        parts.append(f"memory peak {rates['mem_peak_bytes'] / 2**30:.2f} GiB")
    return [", ".join(parts)] if parts else []


def _troubles(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    segments = summary["events"].get("segment", 0)
    if segments > 1:
        lines.append(f"started {segments} times")
    if summary["nonfinite_lines"]:
        lines.append(f"numbers that are not finite in {summary['nonfinite_lines']} lines of metrics.jsonl")
    for one in summary["incidents"]:
        details = ", ".join(f"{key} {value}" for key, value in one.items() if key not in ("time", "event", "kind"))
        lines.append(f"{one.get('time', '')}  {one.get('kind', one.get('event'))}: {details}")
    return lines
