"""Implements `disttrain ckpt convert`, which converts checkpoints between formats in one process, without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from disttrain.runtime.environment import quiet_torch

_FORMATS = "huggingface, safetensors, torch or disttrain"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A run, a checkpoint, or a file or folder saved by Hugging Face, safetensors, torch or DeepSpeed."
        ),
    ],
    target: Annotated[str, typer.Argument(help="A new file or folder. Nothing is overwritten.")],
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help=f"{_FORMATS}. Default: chosen by the file names.")
    ] = None,
    name: Annotated[str, typer.Option(help="The name of the prepared model to export or import.")] = "model",
    build: Annotated[
        bool, typer.Option(help="Build the model of the checkpoint's config, for config.json and tied names.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Convert weights, or a training state of torch DCP or DeepSpeed. A restricted loader reads pickles."""
    quiet_torch()
    import sys
    from contextlib import redirect_stdout

    from disttrain.cli.json_text import json_text
    from disttrain.engine.export import convert as convert_checkpoint

    with redirect_stdout(sys.stderr):  # a user's module may print, and stdout has only the result
        done = convert_checkpoint(source, target, to=to, name=name, build=build)
    if as_json:
        print(json_text({"path": str(done.path), "tensors": done.tensors, "left_out": list(done.left_out)}))
        return
    print(f"{done.path}: {done.tensors} tensors")
    for what in done.left_out:
        print(f"  left out: {what}")
