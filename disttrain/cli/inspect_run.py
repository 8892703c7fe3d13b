"""What a run came to, on one process, without a launcher: `disttrain report`, `sample` and `eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import CheckpointError, ConfigError, explain


def report_run(*, run: str, as_json: bool) -> None:
    """Curves and tables of a run's folder, to stdout."""
    from disttrain.report import RunFolder, render_summary, summarize_run

    folder = RunFolder(Path(run))
    if not folder.metrics.exists():
        raise CheckpointError(
            explain(f"{run} is to be reported.", "no metrics.jsonl in it", "name a run's folder, DIR/NAME")
        )
    summary = summarize_run(folder)
    print(json.dumps(summary) if as_json else render_summary(summary))


def sample_text(*, path: str, prompt: str, length: int, seed: int, temperature: float) -> None:
    """Text from a model over bytes, to stdout: `prompt` and `length` bytes more."""
    import torch

    from disttrain.engine import load
    from disttrain.model import generate

    model = load(path)
    context = getattr(model, "context", None)
    if not isinstance(context, int):
        raise ConfigError(
            explain(
                f"{path} is to write text.",
                f"a {type(model).__qualname__}, which does not say its context",
                "sample from a language model over bytes that has an attribute context, such as gpt",
            )
        )
    start = list(prompt.encode()) or [ord("\n")]
    generator = torch.Generator().manual_seed(seed)
    found = generate(model, start, length=length, context=context, generator=generator, temperature=temperature)
    sys.stdout.write(bytes(start + found).decode("utf-8", errors="replace") + "\n")


def evaluate_run(*, path: str, overrides: Sequence[str], as_json: bool) -> None:
    """Every evaluation set of the run's config, in a world of one, to stdout."""
    from disttrain.config import load_config
    from disttrain.engine import Engine
    from disttrain.engine.loading import config_of, open_newest

    checkpoint = open_newest(path)
    alone = ["strategy.name=none", "mesh.shard=-1", "checkpoint.resume=auto", *overrides]
    config = load_config(config_of(checkpoint), alone)
    with Engine(config) as engine:
        engine.prepare("model")
        engine.load_weights("model", checkpoint.path)
        values = engine.evaluate()
    if not values:
        raise ConfigError(
            explain(f"{path} is to be evaluated.", "no eval.sets in its config", "add one: eval.sets.NAME=...")
        )
    if as_json:
        print(json.dumps({"step": checkpoint.step, **values}))
    else:
        print("\n".join(f"{key:<40} {value:.6g}" for key, value in values.items()))
