"""`disttrain ckpt convert`: a checkpoint from one format to another, on one process, without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from disttrain.runtime.environment import quiet_torch

_FORMATS = "huggingface, safetensors, torch or disttrain"


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A run, a checkpoint, or what Hugging Face, safetensors, torch or DeepSpeed saved."),
    ],
    target: Annotated[str, typer.Argument(help="A new file or folder; nothing is overwritten.")],
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help=f"{_FORMATS}; by the names if left out.")] = None,
    name: Annotated[str, typer.Option(help="The prepared model that goes out, or comes in.")] = "model",
    build: Annotated[
        bool, typer.Option(help="Let the checkpoint's config build its model, for config.json and tied names.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Convert weights, or a whole training state of torch DCP or DeepSpeed; pickles are read by a restricted loader."""
    quiet_torch()
    import sys
    from contextlib import redirect_stdout

    from disttrain.cli.json_text import json_text
    from disttrain.engine.export import convert as convert_checkpoint

    with redirect_stdout(sys.stderr):  # what a user's module prints is no result
        done = convert_checkpoint(source, target, to=to, name=name, build=build)
    if as_json:
        print(json_text({"path": str(done.path), "tensors": done.tensors, "left_out": list(done.left_out)}))
        return
    print(f"{done.path}: {done.tensors} tensors")
    for what in done.left_out:
        print(f"  not in it: {what}")
