"""Loads a validated `Config` from a file, a mapping and overrides, and records the source of every value.

Later steps override earlier ones: the chain of `extends`, the file itself, overrides. Then `${...}` references are
resolved, and schema and rules are checked. All problems are reported at once. Imports no torch and no user code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disttrain.config.files.draft import apply_overrides, begin_draft
from disttrain.config.files.references import resolve_references
from disttrain.config.problems import ConfigProblemsError
from disttrain.config.schema import Config
from disttrain.config.targets.source_search import find_target_problems
from disttrain.config.validate import validate

TRAINED_FROM = ("model", "objective", "data", "optim")
"""The sections that `disttrain.run` needs. A custom loop over Engine may leave them out."""


def load_config(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Any = (),
    *,
    folder: Path | None = None,
    needs: Sequence[str] = (),
) -> Config:
    """Load and validate a config. Local.

    `source` is a file, a mapping or a finished config. `overrides` are `section.key=value` strings, (key, value) pairs,
    or a mapping of keys to values. `folder` is the first folder that import paths resolve from, for a mapping that was
    read from a file. `needs` are the required sections.

    Raises ConfigProblemsError, a ConfigError, that lists every problem with its file and line, and its fix.
    """
    draft = begin_draft(source)
    draft.folder = folder or draft.folder
    apply_overrides(draft, overrides)
    resolve_references(draft)
    return validate(draft, needs)


def load_to_train(source: str | Path | Mapping[str, Any] | Config, overrides: Any = ()) -> Config:
    """Load the config of a run: `load_config` with the sections that a run needs, and a check of every target. Local.

    The check reads the source of each target for its name and arguments, and runs nothing. Raises ConfigProblemsError.
    """
    config = load_config(source, overrides, needs=TRAINED_FROM)
    problems = find_target_problems(config.values(), config.sources, config.folder)
    if problems:
        raise ConfigProblemsError(problems)
    return config
