"""Defines the options and exit codes of the `disttrain ckpt` commands.

Each command runs in one process without a GPU, on folders and stores. Its implementation is in the module of its name,
which is imported with torch only when the command runs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from disttrain.cli.ckpt.convert import convert
from disttrain.cli.json_text import json_text
from disttrain.errors import FINISHED, CheckpointError
from disttrain.runtime.environment import quiet_torch

ckpt = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, inspect, verify, compare, prune and convert checkpoints. Needs one process and no GPU.",
)
DIFFER = 1
"""The exit code of `diff` for checkpoints that differ, as in diff(1)."""

_Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
_Path = Annotated[str, typer.Argument(metavar="PATH", help="A run DIR/NAME, one step-NNNNNNNN in it, or an address.")]
_Name = Annotated[
    str | None, typer.Option("--name", metavar="PATTERN", help="Only tensors whose names match, such as 'model/*'.")
]


@ckpt.command("ls")
def list_all(path: _Path, as_json: _Json = False) -> None:
    """List checkpoints, with their writers and faults. Exit code 5 if no checkpoint is intact."""
    quiet_torch()
    from disttrain.cli.ckpt.find import find_checkpoints
    from disttrain.cli.ckpt.ls import list_checkpoints, render_list

    listed = list_checkpoints(find_checkpoints(path))
    _print(listed, as_json, render_list)
    intact = any(one["intact"] for one in listed["checkpoints"])
    raise typer.Exit(FINISHED if intact else CheckpointError.exit_code)


@ckpt.command()
def inspect(
    path: _Path,
    as_json: _Json = False,
    name: _Name = None,
    boxes: Annotated[bool, typer.Option("--boxes", help="Also show a line for each stored box.")] = False,
) -> None:
    """Show the progress, optimizers and tensors of a checkpoint. Of a run, the newest is shown."""
    quiet_torch()
    from disttrain.cli.ckpt.find import find_one
    from disttrain.cli.ckpt.inspect import inspect_checkpoint, render_inspection

    inspected = inspect_checkpoint(find_one(path), name)
    _print(inspected, as_json, lambda inspected: render_inspection(inspected, boxes=boxes))


@ckpt.command()
def verify(path: _Path, as_json: _Json = False) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of a run. Exit code 5 if anything is damaged."""
    quiet_torch()
    from disttrain.cli.ckpt.find import find_checkpoints
    from disttrain.cli.ckpt.verify import render_verdict, verify_all

    listing = find_checkpoints(path)
    verdicts = []
    for verdict in verify_all(listing):
        verdicts.append(verdict)
        if not as_json:
            print(render_verdict(verdict), flush=True)  # the next checkpoint may take minutes
    others = [{"name": other.name, "what": what} for other, what in listing.others]
    ok = bool(verdicts) and all(one["intact"] for one in verdicts)
    if as_json:
        print(json_text({"ok": ok, "path": path, "checkpoints": verdicts, "others": others}))
    else:
        print("\n".join([*(f"{other['name']}: {other['what']}" for other in others), _count(verdicts)]))
    raise typer.Exit(FINISHED if ok else CheckpointError.exit_code)


@ckpt.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A PATH as of the other commands. Of a run, the newest checkpoint is used."),
    ],
    b: Annotated[str, typer.Argument(metavar="B")],
    as_json: _Json = False,
    name: _Name = None,
    every: Annotated[bool, typer.Option("--all", help="Show every difference, not only the first.")] = False,
) -> None:
    """Compare two checkpoints of any strategy and world size. Exit code 0 if they are equal, 1 if they differ."""
    quiet_torch()
    from disttrain.checkpoint import Checkpoint
    from disttrain.cli.ckpt.diff import diff_checkpoints, render_diff
    from disttrain.cli.ckpt.find import find_one

    left, right = (Checkpoint.open(find_one(path).path) for path in (a, b))
    compared = diff_checkpoints(left, right, name)
    _print(compared, as_json, lambda compared: render_diff(compared, every=every))
    raise typer.Exit(FINISHED if compared["same"] else DIFFER)


@ckpt.command()
def prune(
    path: _Path,
    keep_last: Annotated[int, typer.Option(min=1, metavar="N", help="Keep the newest N intact checkpoints.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also keep steps that are multiples of N.")
    ] = None,
    keep_best: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Also keep the best by METRIC, such as eval/held_out/loss.")
    ] = None,
    mode: Annotated[
        Literal["min", "max"], typer.Option(help="Whether a smaller or a larger METRIC is better.")
    ] = "min",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    as_json: _Json = False,
) -> None:
    """Remove the older checkpoints of a run. Verifies what it keeps, and rejects a run that is active."""
    quiet_torch()
    from disttrain.checkpoint import Best
    from disttrain.cli.ckpt.prune import RetentionRule, prune_run, render_pruning

    best = None if keep_best is None else Best(keep_best, mode)
    pruned = prune_run(path, RetentionRule(keep_last, keep_every, best), dry_run=dry_run)
    _print(pruned, as_json, render_pruning)


ckpt.command()(convert)


def _print(result: dict[str, Any], as_json: bool, render: Any) -> None:
    print(json_text(result) if as_json else render(result))


def _count(verdicts: list[dict[str, Any]]) -> str:
    damaged = sum(not one["intact"] for one in verdicts)
    return f"{len(verdicts)} checkpoint{'' if len(verdicts) == 1 else 's'}, {damaged} damaged"
