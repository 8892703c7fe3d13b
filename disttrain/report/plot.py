"""Draws loss.png, a run's losses and learning rate, from the lines of metrics.jsonl.

Uses no global state of matplotlib and opens no window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain.report.display import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2430", "#7a8194", "#e8eaf0"
TRAIN, SCHEDULE = "#3b6fd4", "#9aa3b5"
EVALUATIONS = ("#e4663a", "#2a9d7f", "#8b5fbf", "#d9a21b", "#c2477f")

_TITLE: dict[str, Any] = {"loc": "left", "color": FAINT, "fontsize": 9.5, "pad": 4}

Curve = tuple[list[float], list[float]]


def plot_loss(metrics: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of train loss, evaluation losses and, below, the learning rate. Replaces `path` atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(metrics)
    train, rate = curve_of(lines, "loss"), curve_of(lines, "lr")
    evaluations = {key: curve_of(lines, key) for key in evaluation_losses(lines)}
    with_rate = bool(rate[0])
    figure = Figure(figsize=(9, 5.4 if with_rate else 4.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)  # the figure keeps the canvas, which measures text
    if with_rate:
        grid = figure.add_gridspec(2, 1, height_ratios=(4.6, 1), hspace=0.1)
        losses = figure.add_subplot(grid[0])
        below = figure.add_subplot(grid[1], sharex=losses)
        _draw_rate(below, rate)
        _dress(losses, "loss", bottom=False)
    else:
        losses = figure.add_subplot()
        _dress(losses, "loss", bottom=True)
    _draw_losses(losses, train, evaluations)
    write_head(figure, path.absolute().parent.name, _subtitle(lines))
    figure.subplots_adjust(left=0.075, right=0.955, top=0.875, bottom=0.095)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": "disttrain"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------- numbers


def curve_of(lines: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Return (steps, values) of every finite value under `key`."""
    steps, values = [], []
    for line in lines:
        value = line.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(float(line["step"]))
            values.append(float(value))
    return steps, values


def evaluation_losses(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys `eval/SET/loss`, in order of appearance."""
    return list(
        dict.fromkeys(key for line in lines for key in line if key.startswith("eval/") and key.endswith("/loss"))
    )


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Return means over `radius` values on each side, or as many as precede a value: a steep start keeps its height."""
    sums = [0.0, *accumulate(values)]
    found = []
    for index in range(len(values)):
        reach = min(radius, index)
        stop = min(index + reach + 1, len(values))
        found.append((sums[stop] - sums[index - reach]) / (stop - index + reach))
    return found


# ---------------------------------------------------------------------- drawing


def _draw_losses(axes: Axes, train: Curve, evaluations: Mapping[str, Curve]) -> None:
    steps, values = train
    if len(values) >= 40:
        radius = max(len(values) // 50, 2)
        axes.set_title(f"loss  (bold: mean of {2 * radius + 1} reported steps)", **_TITLE)
        axes.plot(steps, values, color=TRAIN, linewidth=1, alpha=0.25, zorder=2)
        axes.plot(
            steps,
            smooth(values, radius),
            color=TRAIN,
            linewidth=2,
            label=_label("train", train),
            zorder=3,
        )
    elif values:
        marker = "o" if len(values) == 1 else ""
        axes.plot(steps, values, color=TRAIN, linewidth=2, marker=marker, label=_label("train", train), zorder=3)
    for index, (key, found) in enumerate(evaluations.items()):
        if not found[0]:
            continue
        axes.plot(
            *found,
            color=EVALUATIONS[index % len(EVALUATIONS)],
            linewidth=1.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=1,
            label=_label(key.removeprefix("eval/").removesuffix("/loss"), found),
            zorder=4,
        )
    every = [value for _, found in (train, *evaluations.values()) for value in found]
    if not every:
        axes.text(0.5, 0.5, "no finite loss was reported", transform=axes.transAxes, ha="center", color=FAINT)
        return
    if min(every) > 0 and max(every) / min(every) > 30:
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.legend(frameon=False, loc="upper right", fontsize=10, labelcolor=INK, handlelength=1.4)


def write_head(figure: Figure, name: str, subtitle: str) -> None:
    """Write the name on the left and the subtitle on the right. The name is shortened until they do not overlap."""
    form: dict[str, Any] = {"va": "center", "parse_math": False}  # a `$` in a name is not a formula
    title = figure.text(0.075, 0.955, name, color=INK, fontsize=13, fontweight="bold", **form)
    right = figure.text(0.955, 0.955, subtitle, color=FAINT, fontsize=9.5, ha="right", **form)
    most_px = right.get_window_extent().x0 - 0.02 * figure.bbox.width
    characters = len(name)
    while title.get_window_extent().x1 > most_px and characters > 3:
        characters -= 1
        title.set_text(shortened(name, characters))


def _draw_rate(axes: Axes, rate: Curve) -> None:
    axes.fill_between(*rate, color=SCHEDULE, alpha=0.18, linewidth=0)
    axes.plot(*rate, color=SCHEDULE, linewidth=1.5)
    _dress(axes, "lr", bottom=True)
    axes.set_ylim(0, max(max(rate[1]) * 1.15, 1e-12))
    axes.set_yticks([max(rate[1])], [f"{max(rate[1]):.1e}"])


def _dress(axes: Axes, name: str, *, bottom: bool) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0, labelbottom=bottom)
    axes.margins(x=0.01)
    axes.set_title(name, **_TITLE)
    if bottom:
        axes.set_xlabel("step", color=FAINT, fontsize=9.5)


def _label(name: str, curve: Curve) -> str:
    return f"{name}  {curve[1][-1]:#.4g}"


def shortened(name: str, most: int) -> str:
    """Return `name` in at most `most` characters without its middle: names of related runs differ at either end."""
    if len(name) <= most:
        return name
    head = max(most - 1, 2) // 2
    return f"{name[:head]}…{name[-(max(most - 1, 2) - head) :]}"


def _subtitle(lines: Sequence[Mapping[str, Any]]) -> str:
    last = next((line for line in reversed(lines) if "strategy" in line), None)
    if last is None:
        return ""
    ranks = last.get("world_size")
    parts = [str(last["strategy"]), f"{ranks} rank{'' if ranks == 1 else 's'}", f"{last['step']:,} steps"]
    if last.get("tokens"):
        parts.append(f"{amount(last['tokens'])} tokens")
    return "  ·  ".join(parts)
