"""Implements `disttrain check`, which prints a config's problems, or its values with their sources, without torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from disttrain.cli.json_text import json_text
from disttrain.config import (
    TRAINED_FROM,
    Config,
    ConfigProblem,
    ConfigProblemsError,
    load_config,
    render_config,
    resolve_target,
)
from disttrain.config.problems import UnknownNameError
from disttrain.config.render import every_source, source_of
from disttrain.config.strategy_options import TRANSLATED
from disttrain.config.targets.source_search import find_target_problems
from disttrain.config.targets.target_names import section_of, targets_in
from disttrain.errors import FINISHED, ConfigError


def check_config(
    source: str, overrides: Sequence[str], *, as_json: bool, imports: bool, accelerate: str | None = None
) -> int:
    """Print the result, and return the exit code: 0, or that of ConfigError.

    Args:
        source: the config's file.
        overrides: `section.key=value` each.
        as_json: whether to print JSON.
        imports: whether to import the targets' modules, which runs their code.
        accelerate: the file of accelerate that strategy.name=accelerate translates.
    """
    config, problems = _problems_of(source, overrides, imports=imports, accelerate=accelerate)
    if as_json:
        result: dict[str, Any] = {"ok": not problems, "problems": [vars(problem) for problem in problems]}
        if config is not None:
            result |= {"config": config.to_dict(), "sources": every_source(config)}
        print(json_text(result))
    elif problems:
        print(f"error (exit {ConfigError.exit_code}): {ConfigProblemsError(problems)}", file=sys.stderr)
    elif config is not None:
        print(render_config(config), end="")
        missing = [name for name in TRAINED_FROM if getattr(config, name) is None]
        if missing:
            print(
                f"note: no section {', '.join(missing)}: enough for a custom training loop over Engine, but not for "
                "disttrain.run",
                file=sys.stderr,
            )
        if config.strategy.name == TRANSLATED:
            print(
                "note: `accelerate launch` translates strategy.name=accelerate from its file. "
                "--accelerate FILE shows the result.",
                file=sys.stderr,
            )
    return ConfigError.exit_code if problems else FINISHED


def _problems_of(
    source: str, overrides: Sequence[str], *, imports: bool, accelerate: str | None
) -> tuple[Config | None, Sequence[ConfigProblem]]:
    try:
        config = load_config(source, overrides)
        config = config if accelerate is None else _translated(config, accelerate)
    except ConfigProblemsError as error:
        return None, error.problems
    problems = find_target_problems(config.values(), config.sources, config.folder)
    if imports and not problems:
        with redirect_stdout(sys.stderr):  # a user's module may print, and stdout has only the result
            problems = _import_all(config)
    return config, ConfigProblemsError(problems).problems


def _translated(config: Config, file: str) -> Config:
    """Return the config with the settings of accelerate's file. Raises ConfigProblemsError."""
    from disttrain.config.foreign.accelerate import translate
    from disttrain.config.foreign.accelerate_settings import read_file

    if config.strategy.name != TRANSLATED:
        where = source_of(("strategy", "name"), config.sources)
        problem = f"{config.strategy.name!r} uses nothing from {file}"
        fix = "add strategy.name=accelerate; otherwise accelerate only starts the processes"
        raise ConfigProblemsError([ConfigProblem("strategy.name", where, problem, fix)])
    return translate(read_file(file), config)


def _import_all(config: Config) -> list[ConfigProblem]:
    """Import every target, and check the names of its arguments against its signature."""
    problems = []
    for path, target, args in targets_in(config.values()):
        key = ".".join(map(str, path))
        where = source_of(tuple(map(str, path)), config.sources)
        try:
            call = resolve_target(target, section=section_of(path), folder=config.folder)
        except UnknownNameError as error:
            problems.append(ConfigProblem(key, where, f"{target!r}: {error.problem}", error.fix))
        except (SystemExit, Exception) as error:  # noqa: BLE001 - a user's module may raise anything
            problem = f"{target!r} raises {type(error).__name__}: {error}"
            problems.append(ConfigProblem(key, where, problem, "correct its module"))
        else:
            wrong = _unbindable(call, args)
            if wrong:
                problems.append(
                    ConfigProblem(key, where, f"{target!r}: {wrong}", f"it accepts {inspect.signature(call)}")
                )
    return problems


def _unbindable(call: Any, args: Mapping[str, Any]) -> str:
    try:
        inspect.signature(call).bind_partial(**args)
    except ValueError:  # a callable written in C has no signature to check
        return ""
    except TypeError as error:
        return str(error)
    return ""
