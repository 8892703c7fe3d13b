"""Implements `disttrain eval`, which evaluates a checkpoint in one process, without a launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from tempfile import TemporaryDirectory
from typing import Any

from disttrain.cli.json_text import json_text
from disttrain.errors import ConfigError, explain


def evaluate_run(*, path: str, overrides: Sequence[str], as_json: bool) -> None:
    """Print the metrics of every evaluation set of the run's config to stdout. Writes nothing to the run's folder.

    Raises ConfigError for a config without evaluation sets.
    """
    from disttrain.config import load_config
    from disttrain.engine import Engine, build
    from disttrain.engine.loading import config_of, open_newest

    checkpoint = open_newest(path)
    config = config_of(checkpoint)
    # User code may print, and stdout has only the result.
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        alone: list[Any] = [
            "strategy.name=none",
            "mesh.shard=-1",
            "checkpoint.resume=auto",
            "checkpoint.storage=null",
            ("run.dir", scratch),
        ]
        if config.model is not None:
            alone.append("model.weights=null")  # the checkpoint has the weights; the initial ones may be gone
        with Engine(load_config(config, [*alone, *overrides])) as engine:
            # Evaluation needs no optimizer, and the run's optimizer may have come from Python.
            objective = build.objective_of(engine.config)
            engine.prepare("model", build.model_factory(engine.config), objective=objective)
            engine.load_for_evaluation("model", checkpoint.path)
            values = engine.evaluate()
    if not values:
        raise ConfigError(
            explain(f"Cannot evaluate {path}.", "its config has no eval.sets", "add a set: eval.sets.NAME=...")
        )
    if as_json:
        print(json_text({"step": checkpoint.step, **values}))
    else:
        print("\n".join(f"{key:<40} {value:.6g}" for key, value in values.items()))
