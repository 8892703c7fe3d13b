"""What a run came to, on one process, without a launcher: `disttrain report`, `sample` and `eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from disttrain.cli.json_text import json_text
from disttrain.errors import CheckpointError, ConfigError, explain

if TYPE_CHECKING:
    from torch import nn

_BYTES = 256


def report_run(*, run: str, as_json: bool) -> None:
    """Curves and tables of a run's folder, to stdout."""
    from disttrain.report import RunFolder, render_summary, summarize_run

    folder = RunFolder(Path(run))
    if not folder.metrics.exists():
        found = "no metrics.jsonl in it" if folder.path.is_dir() else "no such folder"
        raise CheckpointError(explain(f"{run} is to be reported.", found, "name a run's folder, DIR/NAME"))
    summary = summarize_run(folder)
    print(json_text(summary) if as_json else render_summary(summary))


def sample_text(*, path: str, prompt: str, length: int, seed: int, temperature: float) -> None:
    """Text from a model over bytes, to stdout: `prompt` and `length` bytes more."""
    import torch

    from disttrain.engine import load
    from disttrain.model import generate

    with redirect_stdout(sys.stderr):  # what a user's module prints is no result
        model = load(path)
    context = _context_over_bytes(model, path)
    start = list(prompt.encode(errors="surrogateescape")) or [ord("\n")]
    generator = torch.Generator().manual_seed(seed)
    found = generate(model, start, length=length, context=context, generator=generator, temperature=temperature)
    sys.stdout.write(bytes(start + found).decode("utf-8", errors="replace") + "\n")


def _context_over_bytes(model: nn.Module, path: str) -> int:
    """How much the model reads at once. Raises ConfigError for one that is no language model over bytes."""
    import torch

    from disttrain.model import logits_of

    found = f"a {type(model).__qualname__}, which does not say its context"
    context = getattr(model, "context", None)
    if isinstance(context, int):
        with torch.no_grad():
            vocab = logits_of(model(torch.zeros(1, 1, dtype=torch.int64))).shape[-1]
        if vocab == _BYTES:
            return context
        found = f"a {type(model).__qualname__} over {vocab} tokens, which only its tokenizer can turn into text"
    do = f"sample from a language model over the {_BYTES} bytes that has an attribute context, such as gpt"
    raise ConfigError(explain(f"{path} is to write text.", found, do))


def evaluate_run(*, path: str, overrides: Sequence[str], as_json: bool) -> None:
    """Every evaluation set of the run's config, alone, to stdout. Writes nothing, to the run least of all."""
    from disttrain.config import load_config
    from disttrain.engine import Engine, build
    from disttrain.engine.loading import config_of, open_newest

    checkpoint = open_newest(path)
    config = config_of(checkpoint)
    with TemporaryDirectory() as nowhere, redirect_stdout(sys.stderr):  # what user code prints is no result
        alone: list[Any] = [
            "strategy.name=none",
            "mesh.shard=-1",
            "checkpoint.resume=auto",
            "checkpoint.storage=null",
            ("run.dir", nowhere),
        ]
        if config.model is not None:
            alone.append("model.weights=null")  # the checkpoint has them; those it began with may be gone
        with Engine(load_config(config, [*alone, *overrides])) as engine:
            # Without an optimizer: the run's own may have come from Python, and none is needed.
            objective = build.objective_of(engine.config)
            engine.prepare("model", build.model_factory(engine.config), objective=objective)
            engine.load_for_evaluation("model", checkpoint.path)
            values = engine.evaluate()
    if not values:
        raise ConfigError(
            explain(f"{path} is to be evaluated.", "no eval.sets in its config", "add one: eval.sets.NAME=...")
        )
    if as_json:
        print(json_text({"step": checkpoint.step, **values}))
    else:
        print("\n".join(f"{key:<40} {value:.6g}" for key, value in values.items()))
