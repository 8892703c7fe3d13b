"""From a file, a mapping and overrides to one validated `Config`: all faults at once, every value's source known.

The order: `extends` chain, the file itself, overrides, `${...}` references, then schema and rules. Imports no torch and
no user code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disttrain.config.draft import apply_overrides, begin_draft
from disttrain.config.references import resolve_references
from disttrain.config.schema import Config
from disttrain.config.validate import validate


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Any = ()) -> Config:
    """The validated config. `overrides` are `section.key=value` texts, (key, value) pairs, or a mapping of those.

    Raises ConfigFaultsError (a ConfigError) with every fault, where it stands, and what to do.
    """
    draft = begin_draft(source)
    apply_overrides(draft, overrides)
    resolve_references(draft)
    return validate(draft)
