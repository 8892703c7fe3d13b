"""`disttrain check`: a config's faults, or its resolved form with every value's source. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from disttrain.config import Config, ConfigFaultsError, Fault, load_config, render_config, resolve_target
from disttrain.config.source_search import find_faults
from disttrain.errors import FINISHED, ConfigError


def check_config(source: str, overrides: Sequence[str], *, as_json: bool, imports: bool) -> int:
    """Print what was found; returns the exit code, 0 or ConfigError's."""
    faults: Sequence[Fault] = ()
    config: Config | None = None
    try:
        config = load_config(source, overrides)
        faults = find_faults(config.to_dict(redact=False), config.sources, config.folder)
        if imports and not faults:
            faults = _import_all(config)
    except ConfigFaultsError as error:
        more = find_faults(*error.unfinished) if error.unfinished is not None else []
        faults = ConfigFaultsError([*error.faults, *more]).faults
    if as_json:
        found = {"ok": not faults, "faults": [vars(fault) for fault in faults]}
        if config is not None:
            found |= {"config": config.to_dict(), "sources": dict(config.sources)}
        print(json.dumps(found))
    elif faults:
        print(f"error (exit {ConfigError.exit_code}): {ConfigFaultsError(faults)}", file=sys.stderr)
    elif config is not None:
        print(render_config(config), end="")
    return ConfigError.exit_code if faults else FINISHED


def _import_all(config: Config) -> list[Fault]:
    faults = []
    for section in ("model", "objective", "optim", "schedule"):
        part = getattr(config, section)
        if part is not None:
            try:
                resolve_target(part.target, section=section, folder=config.folder)
            except (ConfigError, ImportError, SyntaxError) as error:
                faults.append(
                    Fault(f"{section}.target", config.sources.get(f"{section}.target", ""), str(error), "mend it")
                )
    return faults
