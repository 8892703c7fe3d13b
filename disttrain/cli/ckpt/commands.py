"""`disttrain ckpt`: the commands around checkpoints, in folders and stores, on one process, without a GPU.

Owns the options and exit codes. What a command does lies in a module of its own, which is loaded with torch when the
command is given; a further command is one more function here.
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
    help="List, inspect, verify, compare, prune and convert checkpoints: one process, no GPU.",
)
DIFFER = 1
"""Exit code of `diff` where something differs, as diff(1) has it."""

_Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
_Path = Annotated[str, typer.Argument(metavar="PATH", help="A run DIR/NAME, one step-NNNNNNNN, or an address.")]
_Name = Annotated[str | None, typer.Option("--name", metavar="PATTERN", help="Only tensors so named: 'model/*'.")]


@ckpt.command("ls")
def list_all(path: _Path, as_json: _Json = False) -> None:
    """What checkpoints there are, who wrote them, whether their files are all there. Exit code 5 if none is whole."""
    quiet_torch()
    from disttrain.cli.ckpt.pages import describe_all, render_list
    from disttrain.cli.ckpt.survey import find_checkpoints

    found = describe_all(find_checkpoints(path))
    _print(found, as_json, render_list)
    whole = any(one["whole"] for one in found["checkpoints"])
    raise typer.Exit(FINISHED if whole else CheckpointError.exit_code)


@ckpt.command()
def inspect(
    path: _Path,
    as_json: _Json = False,
    name: _Name = None,
    boxes: Annotated[bool, typer.Option("--boxes", help="A line for each stored box too.")] = False,
) -> None:
    """One checkpoint's progress, optimizers and tensors, and in which rank's file each lies. Of a run: the newest."""
    quiet_torch()
    from disttrain.cli.ckpt.pages import inspect_checkpoint, render_inspection
    from disttrain.cli.ckpt.survey import find_one

    found = inspect_checkpoint(find_one(path), name)
    _print(found, as_json, lambda found: render_inspection(found, boxes=boxes))


@ckpt.command()
def verify(path: _Path, as_json: _Json = False) -> None:
    """Read every byte of a checkpoint, or of all of a run; name every fault. Exit code 5 if anything is damaged."""
    quiet_torch()
    from disttrain.cli.ckpt.pages import render_verdict, verify_all
    from disttrain.cli.ckpt.survey import find_checkpoints

    listing = find_checkpoints(path)
    found = []
    for verdict in verify_all(listing):
        found.append(verdict)
        if not as_json:
            print(render_verdict(verdict), flush=True)  # at once: each may take minutes
    others = [{"name": other.name, "what": what} for other, what in listing.others]
    ok = bool(found) and all(one["whole"] for one in found)
    if as_json:
        print(json_text({"ok": ok, "path": path, "checkpoints": found, "others": others}))
    else:
        print("\n".join([*(f"{other['name']}: {other['what']}" for other in others), _count(found)]))
    raise typer.Exit(FINISHED if ok else CheckpointError.exit_code)


@ckpt.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="As PATH of the others; of a run, the newest.")],
    b: Annotated[str, typer.Argument(metavar="B")],
    as_json: _Json = False,
    name: _Name = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every tensor and value that differs, not the first few.")
    ] = False,
) -> None:
    """What differs between two checkpoints, whatever strategy and world wrote them. Exit code 0 if equal, 1 if not."""
    quiet_torch()
    from disttrain.checkpoint import Checkpoint
    from disttrain.cli.ckpt.diff import diff_checkpoints, render_diff
    from disttrain.cli.ckpt.survey import find_one

    left, right = (Checkpoint.open(find_one(path).path) for path in (a, b))
    found = diff_checkpoints(left, right, name)
    _print(found, as_json, lambda found: render_diff(found, every=every))
    raise typer.Exit(FINISHED if found["same"] else DIFFER)


@ckpt.command()
def prune(
    path: _Path,
    keep_last: Annotated[int, typer.Option(min=1, metavar="N", help="Keep the newest N that are whole.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep those too whose step is a multiple of N.")
    ] = None,
    keep_best: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Keep that too which evaluated best: eval/held_out/loss.")
    ] = None,
    mode: Annotated[Literal["min", "max"], typer.Option(help="Whether less or more of METRIC is better.")] = "min",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: _Json = False,
) -> None:
    """Remove a run's older checkpoints, after what is to stay was read and found whole. Not while the run goes on."""
    quiet_torch()
    from disttrain.checkpoint import Best
    from disttrain.cli.ckpt.pruning import Wish, prune_run, render_pruning

    best = None if keep_best is None else Best(keep_best, mode)
    found = prune_run(path, Wish(keep_last, keep_every, best), dry_run=dry_run)
    _print(found, as_json, render_pruning)


ckpt.command()(convert)


def _print(found: dict[str, Any], as_json: bool, render: Any) -> None:
    print(json_text(found) if as_json else render(found))


def _count(found: list[dict[str, Any]]) -> str:
    damaged = sum(not one["whole"] for one in found)
    return f"{len(found)} checkpoint{'' if len(found) == 1 else 's'}, {damaged} damaged"
