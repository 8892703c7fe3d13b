"""From a file, a mapping and overrides to one validated `Config`: all faults at once, every value's source known.

The order: `extends` chain, the file itself, overrides, `${...}` references, then schema and rules. Imports no torch and
no user code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disttrain.config.files.draft import apply_overrides, begin_draft
from disttrain.config.files.references import resolve_references
from disttrain.config.problems import ConfigFaultsError
from disttrain.config.schema import Config
from disttrain.config.targets.source_search import find_faults
from disttrain.config.validate import validate

TRAINED_FROM = ("model", "objective", "data", "optim")
"""The sections that a run needs; an own loop over Engine may do without."""


def load_config(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Any = (),
    *,
    folder: Path | None = None,
    needs: Sequence[str] = (),
) -> Config:
    """The validated config. `overrides` are `section.key=value` texts, (key, value) pairs, or a mapping of those.

    `folder` is where import paths resolve first, for a mapping that came from a file; `needs` are the sections that
    must be there. Raises ConfigFaultsError (a ConfigError) with every fault, where it stands, and what to do.
    """
    draft = begin_draft(source)
    draft.folder = folder or draft.folder
    apply_overrides(draft, overrides)
    resolve_references(draft)
    return validate(draft, needs)


def load_to_train(source: str | Path | Mapping[str, Any] | Config, overrides: Any = ()) -> Config:
    """`load_config` for a run: the sections that it needs, and every target's file, name and arguments by its source.

    Raises ConfigFaultsError.
    """
    config = load_config(source, overrides, needs=TRAINED_FROM)
    faults = find_faults(config.values(), config.sources, config.folder)
    if faults:
        raise ConfigFaultsError(faults)
    return config
