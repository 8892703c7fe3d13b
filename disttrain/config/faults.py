"""Faults of a config, collected and told all at once: which key, where it stands, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.errors import ConfigError


@dataclass(frozen=True)
class Fault:
    """One fault. `key` is dotted, `where` is `file:line`, `override` or `argument`."""

    key: str
    where: str
    found: str
    do: str

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.key or 'config'}{place}\n    found: {self.found}\n    to do: {self.do}"


class ConfigFaultsError(ConfigError):
    """All faults of one config, in the order they stand; `faults` for programs, the message for people.

    `unfinished` is (values, sources, folder) where a config got that far: what else is wrong can still be looked for.
    """

    def __init__(
        self, faults: Sequence[Fault], unfinished: tuple[Mapping[str, Any], Mapping[str, str], Path] | None = None
    ) -> None:
        # One key, one fault: a union of types complains once for each of its members.
        first = {fault.key or fault: fault for fault in reversed(faults)}
        self.faults = tuple(sorted(first.values(), key=_place))
        self.unfinished = unfinished
        number = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{number} in the config\n" + "\n".join(f"  {fault}" for fault in self.faults))


def _place(fault: Fault) -> tuple[bool, str, int]:
    file, _, line = fault.where.rpartition(":")
    return not file, file, int(line) if line.isdigit() else 0


def suggest(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown word: the nearest known one, or all of them. Pure."""
    words = sorted(set(known))
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    listed = ", ".join(words) if words else "none"
    return f"did you mean {near[0]!r}? known: {listed}" if near else f"known: {listed}"


def shown(value: Any) -> str:
    """A value, short enough for one line. Pure."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
