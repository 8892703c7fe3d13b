"""Collects the problems of a config and reports all of them at once: key, file and line, problem and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.config.values import plain
from disttrain.errors import ConfigError, explain


@dataclass(frozen=True)
class ConfigProblem:
    """One problem and its fix. `key` is dotted, `where` is `file:line`, `override` or `argument`."""

    key: str
    where: str
    problem: str
    fix: str

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{self.key or 'config'}{where}\n    problem: {self.problem}\n    fix: {self.fix}"


class ConfigProblemsError(ConfigError):
    """All problems of one config, in the order of their lines. Programs read `problems`, people the message."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        # One problem for each key, the first cause: what follows from it (a reference without a value) would confuse.
        first: dict[str | ConfigProblem, ConfigProblem] = {}
        for problem in problems:
            first.setdefault(problem.key or problem, problem)
        self.problems = tuple(sorted(first.values(), key=_position))
        number = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{number} in the config\n" + "\n".join(f"  {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:  # a pool of processes hangs on an error that does not unpickle
        return type(self), (self.problems,)


class UnknownNameError(ConfigError):
    """A name that does not exist. The parts of its message make a ConfigProblem where key and line are known."""

    def __init__(self, failed: str, problem: str, fix: str) -> None:
        self.failed, self.problem, self.fix = failed, problem, fix
        super().__init__(explain(failed, problem, fix))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failed, self.problem, self.fix)


def dotted(path: Iterable[Any]) -> str:
    """A path of keys as the user writes it. Pure."""
    return ".".join(map(str, path))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one is closest to, or None where no word is close. Pure."""
    words = {one.lower(): one for one in sorted(set(known))}
    near = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    return words[near[0]] if near else None


def suggest(word: str, known: Iterable[str]) -> str:
    """The fix for an unknown word: the nearest known one, and the list of all. Pure."""
    words = sorted(set(known))
    near = nearest(word, words)
    listed = f"known: {', '.join(words) if words else 'none'}"
    return f"did you mean {near!r}? {listed}" if near is not None else listed


def shown(value: Any, key: str = "") -> str:
    """A value, shortened to one line, redacted where the name `key` says that it is a secret. Pure."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(plain(value, redact=True, key=key))
    return text if len(text) <= 80 else text[:77] + "..."


def _position(problem: ConfigProblem) -> tuple[bool, str, int]:
    file, _, line = problem.where.rpartition(":")
    return not file, file, int(line) if line.isdigit() else 0
