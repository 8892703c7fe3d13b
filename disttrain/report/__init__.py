"""Reports a run: its folder, metrics, progress and summary. Used by the engine and by `disttrain report`.

The names are loaded on first use, so that reading a summary imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.report.plot import plot_loss
    from disttrain.report.rate import Rate
    from disttrain.report.reporter import Reporter
    from disttrain.report.run_folder import RunFolder
    from disttrain.report.summary import render_summary, summarize_run
    from disttrain.report.trackers import TensorBoardTracker, Tracker

__all__ = [
    "Rate",
    "Reporter",
    "RunFolder",
    "TensorBoardTracker",
    "Tracker",
    "plot_loss",
    "render_summary",
    "summarize_run",
]

_MODULES = {
    "Rate": "rate",
    "Reporter": "reporter",
    "RunFolder": "run_folder",
    "TensorBoardTracker": "trackers",
    "Tracker": "trackers",
    "plot_loss": "plot",
    "render_summary": "summary",
    "summarize_run": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
