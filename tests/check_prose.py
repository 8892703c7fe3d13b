"""Counts phrases that the project's prose avoids, in docstrings, comments, messages, names of tests, docs and configs.

Run `python tests/check_prose.py` from the project's folder. It prints one line per occurrence and a count per phrase,
and exits with 1 if there is any. `launch/test.sh` runs it. Inline code and code blocks of Markdown files are skipped,
and so are strings in tests, which are data. A phrase may continue on the next line.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

# A space stands for any white space.
PHRASES: dict[str, str] = {
    "is to ...": r"\b(?:is|are|was|were) (?:not |only |then |also |still )?to (?!the\b|an?\b|this\b)[a-z]",
    "own without its owner": r"(?<!\bits )(?<!\btheir )(?<!\byour )(?<!\bour )(?<!'s )(?<!s' )\bown\b",
    "of its own": r"\b(?:of|for) (?:its|their|your|our|his|my) own\b",
    "What of": r"\bwhat of\b",
    "begin anew": r"\banew\b",
    "way": r"\bby which way\b|\bother ways\b|\bin (?:one|no|another) way\b|\bthe way to (?:it|them)\b|\b's way\b",
    "goes on": r"\b(?:go|goes|went|going|gone) on\b",
    "tell": r"\b(?:tell|tells|telling|told)\b",
    "found as a noun": r"\b(?:a|the|as|of|was|what) found\b(?! (?:in|by|at)\b)",
    "lies": r"\b(?:lies|lie|lay|lying|lain)\b",
    "stands": r"\b(?:stands|standing|stood)\b(?! for\b)|\bstand (?:in|on|at|there|where|between)\b",
    "beside": r"\bbesides?\b",
    "refuse": r"\brefus(?:e|es|ed|al|als|ing)\b",
    "laid": r"\blaid\b",
    "house words": r"(?<!make )(?<!makes )\b(?:rooms?|houses?|floors?|trails?)\b",
    "whole": r"\bwhole\b(?! numbers?\b)",
    "hand": r"\b(?:hands|handed|handing)\b|(?<!\bby )\bhand\b(?!-)",
    "such as pronoun": r"\b(?:and|or|as|of|with|than|where) such\b(?! (?:a|an|as)\b)|\bsuch(?=[,.;:)])",
    "bring": r"\b(?:bring|brings|brought|bringing)\b",
    "be it": r"\bbe (?:it|they) (?:whose|what|which)\b",
    "without a word": r"\bwithout (?:a|one|another) word\b",
    "let go of": r"\blets? go (?:of|at)\b|\btaken? along\b",
    "old labels": r"(?:^|\s)(?:found|to do): ",
}
STARTS = r"\A\s*(?:(?:What|Which|Whose|Ones|Those|Them|Such)\b|One (?:of|that|which|in|with)\b)"
COMPILED = {name: re.compile(pattern.replace(" ", r"\s"), re.IGNORECASE) for name, pattern in PHRASES.items()}
DOCSTRINGS = {**COMPILED, "begins with a pronoun": re.compile(STARTS)}

EXEMPT = {"tests/check_prose.py", "LICENSE"}


def prose_of_python(text: str, *, tests: bool) -> Iterator[tuple[int, str, bool]]:
    """Yields (first line, text, whether it is a docstring) of the prose in a Python source.

    That is every comment and docstring. In tests it is also the name of every function and class, elsewhere it is
    every other string, where `` stands for each value of an f-string.
    """
    yield from ((line, comment, False) for line, comment in comments_of_python(text))
    tree = ast.parse(text)
    docstrings, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.body and isinstance(node.body[0], ast.Expr):
                docstrings.add(node.body[0].value)
            if tests and not isinstance(node, ast.Module):
                yield node.lineno, node.name.replace("_", " "), False
        elif isinstance(node, ast.JoinedStr):
            parts.update(node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            if node in docstrings or not tests:
                yield node.lineno, node.value, node in docstrings
        elif isinstance(node, ast.JoinedStr) and not tests:
            pieces = [part.value if isinstance(part, ast.Constant) else "``" for part in node.values]
            yield node.lineno, "".join(str(piece) for piece in pieces), False


def comments_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yields each comment of a Python source. Comments that fill consecutive lines are one."""
    start, block = 0, [""]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != start + len(block) or not token.line.lstrip().startswith("#"):
                yield start, "\n".join(block)
                start, block = token.start[0], []
            block.append(token.string.lstrip("# "))
    yield start, "\n".join(block)


def prose_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yields the text of a Markdown page between its code blocks."""
    start, block, fenced = 1, [""], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            yield start, "\n".join(block)
            start, block = number + 1, []
        elif not fenced:
            block.append(line)
    yield start, "\n".join(block)


def comments_of(text: str) -> Iterator[tuple[int, str]]:
    """Yields the comments of a YAML, TOML or shell file."""
    for number, line in enumerate(text.splitlines(), 1):
        if "#" in line:
            yield number, line[line.index("#") :]


def prose_of(name: str) -> Iterator[tuple[int, str, bool]]:
    """Yields (first line, text, whether it is a docstring) of the prose in the file `name`, relative to the project."""
    path = PROJECT / name
    if name in EXEMPT or not path.is_file():
        return
    if path.suffix == ".py":
        yield from prose_of_python(path.read_text(encoding="utf-8"), tests=name.startswith("tests/"))
    elif path.suffix == ".md":
        yield from ((line, text, False) for line, text in prose_of_markdown(path.read_text(encoding="utf-8")))
    elif path.suffix in (".yaml", ".toml", ".sh", ".sbatch"):
        yield from ((line, text, False) for line, text in comments_of(path.read_text(encoding="utf-8")))


def occurrences(name: str) -> Iterator[tuple[str, int, str]]:
    """Yields (phrase, line, text) for each phrase in the file `name`, relative to the project."""
    for start, prose, docstring in prose_of(name):
        text = re.sub(r"`[^`\n]*`", "``", prose)
        for phrase, pattern in (DOCSTRINGS if docstring else COMPILED).items():
            for found in pattern.finditer(text):
                excerpt = " ".join(text[max(0, found.start() - 50) : found.end() + 50].split())
                yield phrase, start + text[: found.start()].count("\n"), excerpt


def main() -> int:
    """Prints the occurrences and counts. Returns the exit code."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
    )
    names = sys.argv[1:] or listed.stdout.split("\n")
    counts: Counter[str] = Counter()
    for name in names:
        for phrase, line, text in occurrences(name):
            counts[phrase] += 1
            print(f"{name}:{line}: {phrase}: {text}")
    for phrase in DOCSTRINGS:
        print(f"{counts[phrase]:6d}  {phrase}")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
