"""Implements `disttrain report`, which prints the curves and tables of a run's folder."""

from __future__ import annotations

from pathlib import Path

from disttrain.cli.json_text import json_text
from disttrain.errors import CheckpointError, explain


def report_run(*, run: str, as_json: bool) -> None:
    """Print the summary of a run's folder to stdout. Raises CheckpointError for a folder without metrics."""
    from disttrain.report import RunFolder, render_summary, summarize_run

    folder = RunFolder(Path(run))
    if not folder.metrics.exists():
        problem = "it has no metrics.jsonl" if folder.path.is_dir() else "no such folder"
        raise CheckpointError(explain(f"{run} is not a run's folder.", problem, "name a run's folder, DIR/NAME"))
    summary = summarize_run(folder)
    print(json_text(summary) if as_json else render_summary(summary))
