"""Implements `disttrain parity`, which checks whether a config trains the same everywhere and explains differences."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from disttrain.cli.json_text import json_text
from disttrain.config import load_to_train
from disttrain.errors import ConfigError, explain
from disttrain.runtime.environment import quiet_torch

if TYPE_CHECKING:
    from disttrain.parity.compare import TensorDifference
    from disttrain.parity.report import Report, Row

_SHOWN = 3
_VERDICTS = {"draws": "redraws"}


def check_parity(
    config: str,
    overrides: Sequence[str],
    *,
    strategies: str | None,
    cases: Sequence[str],
    world_sizes: str,
    micro_batches: str | None,
    steps: int,
    limit_s: float,
    as_json: bool,
) -> int:
    """Prints the result. Returns the exit code: 0 all equal, 6 something differs, else that of the first failure."""
    load_to_train(config, overrides)  # reports a bad config before torch is imported
    sizes, micro = _numbers("--world-sizes", world_sizes), _numbers("--micro-batches", micro_batches or "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its processes end with it
    quiet_torch()
    from disttrain.parity.proof import prove_parity
    from disttrain.parity.variants import Asked

    asked = Asked(
        strategies=tuple(filter(None, (strategies or "").split(","))),
        cases=tuple(cases),
        world_sizes=sizes,
        micro_batches=micro,
    )
    report = prove_parity(config, overrides, asked, steps=steps, limit_s=limit_s, say=_say)
    print(json_text(report.to_dict()) if as_json else render_report(report))
    return report.exit_code


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if any(not word.isdecimal() or int(word) < 1 for word in words):
        raise ConfigError(
            explain(f"Cannot read {option}.", f"{text!r} is not a list of positive integers", f"write {option} 1,2")
        )
    return tuple(int(word) for word in words)


def _say(line: str) -> None:
    print(f"[parity] {line}", file=sys.stderr, flush=True)


def render_report(report: Report) -> str:
    """Returns the table, followed by details of each row that is not simply equal."""
    kind = "a plain PyTorch loop" if report.plain else "strategy none"
    head = ("case", "processes", "micro-batch", "loss", "grad norm", "parameters", "")
    lines = [_cells(row) for row in report.rows]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]
    bounds = report.bounds
    return "\n".join(
        [
            f"Reference: {kind}, one process, global batch {report.global_batch}, micro-batch {report.micro_batch}, "
            f"{report.steps} steps.",
            f"Largest relative differences over the steps; bounds: loss {bounds.loss:.1e}, gradient norm "
            f"{bounds.norm:.1e}, a parameter's norm {bounds.parameters:.1e}.",
            "",
            *table,
            *[line for row in report.rows for line in _details(row)],
            *_note(report),
            "",
            _summary(report),
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    found = row.difference
    figures = [f"{one:.1e}" for one in (found.loss, found.norm, found.parameters)] if found else ["-"] * 3
    verdict = _VERDICTS.get(str(row.verdict), str(row.verdict))
    return (row.name, str(row.world_size), str(row.micro_batch or "-"), *figures, verdict)


def _details(row: Row) -> list[str]:
    """Returns the details of a row; none for an equal row without notes."""
    found, lines = row.difference, []
    if found is not None and found.first_step is not None:
        where = (
            "the initial weights"
            if found.first_step == 0
            else f"step {found.first_step}, first in its {found.first_in}"
        )
        lines.append(f"  differs from {where}")
        lines += [f"  parameters: {_list(found.tensors)}"] if found.tensors else []
        lines += [f"  only in one of the runs: {', '.join(found.missing[:_SHOWN])}"] if found.missing else []
    if found is not None and found.undetermined:
        lines.append(
            "  undetermined, the gradient never rises above its rounding: "
            + ", ".join(f"{one.name} ({one.undetermined} of {one.entries} entries)" for one in found.undetermined)
        )
    if row.error is not None:
        code = f"exit code {row.error.exit_code}: " if row.error.exit_code else ""
        lines += [f"  {line}" for line in f"{code}{row.error.text}".splitlines()]
    for cause in row.causes:
        word = "note" if row.verdict == "equal" else "cause"
        lines += [f"  {word}: {cause.cause}: {cause.text}", f"  shown by: {cause.shown_by}"]
    return ["", f"{row.title}: {_VERDICTS.get(str(row.verdict), row.verdict)}", *lines] if lines else []


def _list(tensors: Sequence[TensorDifference]) -> str:
    shown = ", ".join(f"{one.name} by {one.relative:.1e} (from step {one.step})" for one in tensors[:_SHOWN])
    return shown + (f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else "")


def _note(report: Report) -> list[str]:
    """Reports a defect of the objective that changed nothing in these runs."""
    told = any(report.note in row.causes for row in report.rows)
    return [] if report.note is None or told else ["", f"note: {report.note.text}", f"  {report.note.shown_by}"]


def _summary(report: Report) -> str:
    verdicts = [row.verdict for row in report.rows]
    counted = [(name, verdicts.count(name)) for name in ("equal", "draws", "differs", "rejected", "failed", "skipped")]
    if len(set(verdicts)) == 1 and verdicts[0] == "equal":
        return f"All {len(verdicts)} equal."
    return ", ".join(f"{count} {_VERDICTS.get(name, name)}" for name, count in counted if count) + "."
