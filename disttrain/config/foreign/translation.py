"""Values from another tool's settings on their way into a config: sources kept, contradictions refused, all at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from disttrain.config.files.draft import begin_draft
from disttrain.config.foreign.accelerate_settings import Settings
from disttrain.config.problems import ConfigFaultsError, Fault, shown
from disttrain.config.schema import Config
from disttrain.config.strategy_options import TRANSLATED
from disttrain.config.validate import validate


@dataclass
class Translation:
    """Values by our key with accelerate's key for each, and what is to be refused."""

    settings: Settings
    config: Config
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def said(self, key: str) -> Any:
        """accelerate's value, or its default; None where it has none."""
        return self.settings.values.get(key)

    def refuse(self, key: str, why: str, do: str) -> None:
        """Note that accelerate's value cannot be honoured."""
        places = self.settings.places
        silent = "" if key in places else " by accelerate's own default"
        where = places.get(key, self.settings.name)
        self.faults.append(Fault(key, where, f"{shown(self.said(key))}{silent}, {why}", do))

    def put(self, ours: str, value: Any, key: str, *open_values: Any) -> None:
        """Lay a value; the config's own word for it must be the same, or one of `open_values`."""
        stated = reduce(getattr, ours.split("."), self.config)
        source = self.config.sources.get(ours)
        if source is None or stated == value or stated in open_values:
            self.values[ours] = (value, key)
        else:
            found = f"where {ours} is {shown(stated, ours)} ({source})"
            self.refuse(key, found, "let the two say the same, or take one of them out")

    def laid_over(self) -> Config:
        """The config with everything in its place. Raises ConfigFaultsError."""
        draft = begin_draft(self.config)
        for ours, (value, key) in self.values.items():
            *around, name = ours.split(".")
            place = reduce(dict.__getitem__, around, draft.value)
            place[name], draft.sources[ours] = value, f"{TRANSLATED}: {key}"
        try:
            config = validate(draft)
        except ConfigFaultsError as error:
            raise ConfigFaultsError([*self.faults, *error.faults]) from None
        if self.faults:
            raise ConfigFaultsError(self.faults)
        return config
