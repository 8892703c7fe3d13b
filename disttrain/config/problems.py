"""Faults of a config, collected and told all at once: which key, where it stands, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.config.values import plain
from disttrain.errors import ConfigError, explain


@dataclass(frozen=True)
class Fault:
    """One fault. `key` is dotted, `where` is `file:line`, `override` or `argument`."""

    key: str
    where: str
    found: str
    do: str

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.key or 'config'}{place}\n    problem: {self.found}\n    fix: {self.do}"


class ConfigFaultsError(ConfigError):
    """All faults of one config, in the order they stand; `faults` for programs, the message for people."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        # One key, one fault: the first cause; what follows from it (a reference's missing value) would only confuse.
        first: dict[str | Fault, Fault] = {}
        for fault in faults:
            first.setdefault(fault.key or fault, fault)
        self.faults = tuple(sorted(first.values(), key=_place))
        number = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{number} in the config\n" + "\n".join(f"  {fault}" for fault in self.faults))

    def __reduce__(self) -> tuple[Any, ...]:  # a pool of processes hangs on an error that does not unpickle
        return type(self), (self.faults,)


class UnknownNameError(ConfigError):
    """A name that is none: its parts stay apart, for whoever knows key and line to make a Fault of."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__(explain(asked, found, do))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.asked, self.found, self.do)


def dotted(path: Iterable[Any]) -> str:
    """A path of keys as the user writes it. Pure."""
    return ".".join(map(str, path))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one is closest to, if any is close. Pure."""
    words = {one.lower(): one for one in sorted(set(known))}
    near = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    return words[near[0]] if near else None


def suggest(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown word: the nearest known one, and all of them. Pure."""
    words = sorted(set(known))
    near = nearest(word, words)
    listed = f"known: {', '.join(words) if words else 'none'}"
    return f"did you mean {near!r}? {listed}" if near is not None else listed


def shown(value: Any, key: str = "") -> str:
    """A value, short enough for one line, without the secret that `key` may say it is. Pure."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(plain(value, redact=True, key=key))
    return text if len(text) <= 80 else text[:77] + "..."


def _place(fault: Fault) -> tuple[bool, str, int]:
    file, _, line = fault.where.rpartition(":")
    return not file, file, int(line) if line.isdigit() else 0
