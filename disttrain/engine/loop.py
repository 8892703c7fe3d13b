"""Provides the training loop of `disttrain.run` and `disttrain.train`, over the public `Engine` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.config import Config, load_to_train
from disttrain.engine.engine import Engine


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Attributes:
        folder: the run's folder.
        step: the last step.
        state: `finished`, or `interrupted` after Ctrl-C.
        evaluation: the values of the last evaluation, by `eval/SET/NAME`.
    """

    folder: Path
    step: int
    state: str
    evaluation: Mapping[str, float]


def train(
    config: Config | Mapping[str, Any] | str | Path, overrides: Any = (), *, logs: bool = True, **more: Any
) -> Run:
    """Train what a config describes, or continue the run in its folder. Collective.

    Args:
        config: a `Config`, a mapping of its sections, or the path of a YAML file.
        overrides: `section.key=value` texts, or a mapping of dotted keys to values.
        logs: whether to report folder, resume, end and warnings on stderr, as `Engine` does.
        **more: further overrides. `run={"steps": 10, ...}` replaces a section, and `run__steps=10` sets one key.

    Returns:
        The run's folder, last step, state and last evaluation. A run that had finished before returns at once.

    Raises:
        ConfigError, LaunchError, DataError, CheckpointError, TrainingError: as the class says who can fix it.

    Example:
        >>> run = disttrain.train("config.yaml", run__steps=100)
        >>> run.state, run.step
        ('finished', 100)
    """
    given = [*_listed(overrides), *_listed({key.replace("__", "."): value for key, value in more.items()})]
    loaded = load_to_train(config, given)
    with Engine(loaded, logs=logs) as engine:
        engine.prepare("model")
        batches = engine.batches(seed_generators=False)
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
            evaluation = engine.run_log.last_evaluation()
        elif loaded.eval is not None and loaded.eval.at_end and not engine.interrupted and not engine.evaluated():
            evaluation = engine.evaluate()
        state = engine.finish()
        return Run(engine.folder, engine.progress.steps, state, evaluation)


def _listed(overrides: Any) -> list[Any]:
    if isinstance(overrides, str):
        return [overrides]
    return list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
