"""The training loop of `disttrain.run` and `disttrain.train`: nothing but the public `Engine`, read top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config import Config, load_to_train
from disttrain.engine.engine import Engine


@dataclass(frozen=True)
class Run:
    """What came of a run: its folder, the last step, why it ended (`finished` or `preempted`), last evaluation."""

    folder: Path
    step: int
    state: str
    evaluation: Mapping[str, float]


def train(config: Config | Mapping[str, Any] | str | Path, overrides: Any = (), **more: Any) -> Run:
    """Train what a config describes; continues where its folder stands. Every process of the world calls it.

    `overrides` are `section.key=value` texts or a mapping; keyword arguments replace whole sections
    (`train(config, run={"steps": 10, ...})`) or, with double underscores, single keys (`run__steps=10`).
    """
    given = [*_listed(overrides), *_listed({key.replace("__", "."): value for key, value in more.items()})]
    loaded = load_to_train(config, given)
    with Engine(loaded) as engine:
        engine.prepare("model")
        batches = engine.batches(own_draws=False)
        evaluation: dict[str, float] = {}
        for micro_batches in batches:
            engine.accumulate("model", micro_batches)
            engine.step("model")
            engine.log()
            if engine.due("eval"):
                evaluation = engine.evaluate()
            if engine.should_stop():
                break
        if engine.was_finished:
            evaluation = engine.record.last_evaluation()
        elif loaded.eval is not None and loaded.eval.at_end and not engine.interrupted and not engine.evaluated():
            evaluation = engine.evaluate()
        state = engine.finish()
        return Run(engine.folder, engine.progress.steps, state, evaluation)


def _listed(overrides: Any) -> list[Any]:
    if isinstance(overrides, str):
        return [overrides]
    return list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
