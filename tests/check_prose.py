"""Counts phrases that the project's prose avoids, in docstrings, comments, messages, docs and configs.

Run `python tests/check_prose.py` from the project's folder. It prints one line per occurrence and a count per phrase,
and exits with 1 if there is any. `launch/test.sh` runs it. Identifiers and code blocks of Markdown files are skipped.
"""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

PHRASES: dict[str, str] = {
    "is to ...": r"\b(?:is|are|was|were) to "
    r"(?:be|have|say|hold|go|do|take|bring|give|come|name|run|train|continue|record|save)\b",
    "a bare own": r"\b(?:an? own|own loops?|own draws)\b|\bof (?:its|their|your|our) own(?=[.,;:)]|$)",
    "What of": r"\b[Ww]hat of\b",
    "begin anew": r"\b(?:begin(?:s|ning)?|began|begun) anew\b|\banew\b",
    "by which way": r"\bby which way\b|\bother ways\b|\bin (?:one|no) way of\b",
    "goes on": r"\b(?:go|goes|went|going|gone) on\b",
    "tells": r"\b(?:is|are|was|be|and|it) told\b|\btells? (?:of|how|why|what|which|where)\b",
    "lies": r"\b(?:lies|lie|lay|lying) (?:in|on|at|there|beside|under|elsewhere|where)\b",
    "beside": r"\bbesides?\b",
    "refuse": r"\brefus(?:e|es|ed|al|als|ing)\b",
    "laid out": r"\blaid out\b",
    "house words": r"(?<!make )(?<!makes )\b(?:rooms?|houses?|floors?|trails?)\b",
    "whole": r"\bwhole\b(?! number)",
    "hand on": r"\bhand(?:s|ed|ing)? (?:over|on|down|back|out)\b|\bhands? it\b",
    "such as pronoun": r"\b(?:and|or|as|of|with|than|where) such\b(?! (?:a|an|as)\b)|\bsuch(?=[,.;:)])",
    "bring": r"\b(?:brings|brought|bringing)\b",
    "be it": r"\bbe (?:it|they) (?:whose|what|which)\b",
    "old labels": r"(?:^|\s)(?:found|to do): ",
}
COMPILED = {name: re.compile(pattern) for name, pattern in PHRASES.items()}

EXEMPT = {"tests/check_prose.py", "LICENSE"}


def prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yields each comment and string literal of a Python source with its first line number."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or token.type == tokenize.STRING or token.type == _F_STRING:
            yield token.start[0], token.string


_F_STRING = getattr(tokenize, "FSTRING_MIDDLE", -1)


def prose_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a Markdown page that are outside code blocks, without inline code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`", "``", line)


def comments_of(text: str) -> Iterator[tuple[int, str]]:
    """Yields the comments of a YAML, TOML or shell file."""
    for number, line in enumerate(text.splitlines(), 1):
        if "#" in line:
            yield number, line[line.index("#") :]


READERS = {
    ".py": prose_of_python,
    ".md": prose_of_markdown,
    ".yaml": comments_of,
    ".toml": comments_of,
    ".sh": comments_of,
    ".sbatch": comments_of,
}


def occurrences(name: str) -> Iterator[tuple[str, int, str]]:
    """Yields (phrase, line, text) for each phrase in the file `name`, relative to the project."""
    path = PROJECT / name
    reader = READERS.get(path.suffix)
    if reader is None or name in EXEMPT or not path.is_file():
        return
    pieces = reader(path.read_text(encoding="utf-8"))
    if name.startswith("tests/") and path.suffix == ".py":
        pieces = itertools.islice(pieces, 1)  # the module's docstring; the other strings of a test are data
    for start, piece in pieces:
        for offset, line in enumerate(re.sub(r"`[^`\n]*`", "``", piece).splitlines()):
            for phrase, pattern in COMPILED.items():
                for _ in pattern.finditer(line):
                    yield phrase, start + offset, line.strip()


def main() -> int:
    """Prints what was found; returns the exit code."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
    )
    names = sys.argv[1:] or listed.stdout.split("\n")
    counts: Counter[str] = Counter()
    for name in names:
        for phrase, line, text in occurrences(name):
            counts[phrase] += 1
            print(f"{name}:{line}: {phrase}: {text[:120]}")
    for phrase in PHRASES:
        print(f"{counts[phrase]:6d}  {phrase}")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
