"""Collects translated settings and merges them into a config, with their sources. Rejects contradictions together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from disttrain.config.files.draft import begin_draft
from disttrain.config.foreign.accelerate_settings import Settings
from disttrain.config.problems import ConfigProblem, ConfigProblemsError, shown
from disttrain.config.schema import Config
from disttrain.config.strategy_options import TRANSLATED
from disttrain.config.validate import validate


@dataclass
class Translation:
    """Translated values by disttrain's key, each with accelerate's key, and the problems found so far."""

    settings: Settings
    config: Config
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)

    def said(self, key: str) -> Any:
        """The value in accelerate's settings, or its default, or None."""
        return self.settings.values.get(key)

    def reject(self, key: str, why: str, fix: str) -> None:
        """Record that accelerate's value cannot be used."""
        places = self.settings.places
        silent = "" if key in places else " (accelerate's default)"
        where = places.get(key, self.settings.name)
        self.problems.append(ConfigProblem(key, where, f"{shown(self.said(key))}{silent}, {why}", fix))

    def put(self, ours: str, value: Any, key: str, *open_values: Any) -> None:
        """Record a value for the config. If the config states the key, its value must be equal or in `open_values`."""
        stated = reduce(getattr, ours.split("."), self.config)
        source = self.config.sources.get(ours)
        if source is None or stated == value or stated in open_values:
            self.values[ours] = (value, key)
        else:
            self.reject(
                key, f"but {ours} is {shown(stated, ours)} ({source})", "make both equal, or remove one of them"
            )

    def laid_over(self) -> Config:
        """The config with all translated values. Raises ConfigProblemsError."""
        draft = begin_draft(self.config)
        for ours, (value, key) in self.values.items():
            *around, name = ours.split(".")
            place = reduce(dict.__getitem__, around, draft.value)
            place[name], draft.sources[ours] = value, f"{TRANSLATED}: {key}"
        try:
            config = validate(draft)
        except ConfigProblemsError as error:
            raise ConfigProblemsError([*self.problems, *error.problems]) from None
        if self.problems:
            raise ConfigProblemsError(self.problems)
        return config
