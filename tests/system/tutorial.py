"""Runs a tutorial page: writes its files, types its commands into one shell, compares what they print with the page.

A page is Markdown. Its fenced blocks mean:

- ``python``, ``yaml``, ``json``, ``bash`` or ``text`` with ``# file: NAME`` in the first line: a file, written into an
  empty folder in page order (in JSON, which has no comments, without that line).
- ``console``: lines ``$ command`` (a final backslash continues it), each followed by the lines it prints. ``...`` alone
  stands for any lines, ``…`` inside a line for any text. Numbers with a decimal point or an exponent may differ by 1 %.
  A command must return 0 unless the next command is ``echo $?``.
- ``bash`` without a file name: not run here. ``<!-- run by tests/system/test_x.py -->`` before it names the test.
- any other block: an excerpt of a file of the page, or preceded by ``<!-- run by ... -->`` or by
  ``<!-- not run: WHY -->``.

The folder also has links to the project's ``configs``, ``launch`` and ``slurm``, as a clone has them.

Usage by hand: ``python tests/system/tutorial.py docs/tutorials/x.md``. ``--show`` prints the real output of every
command, ready to be pasted. ``--code DIR`` runs another copy of disttrain. ``--folder DIR`` keeps the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launched import PROJECT, user_environment

LINKED = ("configs", "launch", "slurm")
# The losses on a page are deterministic on one machine. Another processor's kernels change their last digits.
RELATIVE_TOLERANCE = 1e-2
PAGE_TIMEOUT_S = 900.0  # a page takes less than 40 s on two idle cores; shared machines are slower

FENCE = re.compile(
    r"^(?P<comment><!--[^\n]*-->\n\n?)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
FILE_LINE = re.compile(r"# file: (?P<name>[\w./-]+)\n")
FLOAT = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)", re.IGNORECASE)
RUN_BY = re.compile(r"<!-- run by (?P<test>tests/[\w/]+\.py) -->")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->")

# Started by path: without --standalone, two pages that run at the same time would use the same torchrun port.
TORCHRUN = """#!/bin/sh
case " $* " in
  *" --nnodes"* | *" --rdzv"* | *" --master"* | *" --standalone "*) exec {python} -m torch.distributed.run "$@" ;;
  *) exec {python} -m torch.distributed.run --standalone "$@" ;;
esac
"""
# Reads names of scripts and runs each in this one shell, so that `cd`, `export` and `$?` work as in a terminal.
LOOP = r"""
__code=0
while IFS= read -r __script; do
  source "$__script" </dev/null
  __code=$?
  printf '\n%s %d\n' "$PAGE_MARK" "$__code"
done
"""


class PageError(AssertionError):
    """A command of a page fails, or its output differs from the page."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the comment before it, and the number of its first line."""

    language: str
    body: str
    comment: str
    line: int

    @property
    def file(self) -> str | None:
        """The name in the first line, if the block is a file."""
        match = FILE_LINE.match(self.body)
        return match["name"] if match else None

    @property
    def content(self) -> str:
        """The text that is written into the file."""
        return self.body[self.body.index("\n") + 1 :] if self.language == "json" else self.body


@dataclass(frozen=True)
class Command:
    """A command of a console block, the output lines shown for it, and its line number on the page."""

    text: str
    shown: tuple[str, ...]
    line: int
    may_fail: bool


@dataclass(frozen=True)
class Ran:
    """A command's output (stdout and stderr in order), its exit code, and its duration."""

    output: str
    code: int
    seconds: float


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(
            match["language"], match["body"], (match["comment"] or "").strip(), text.count("\n", 0, match.start("body"))
        )
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a console block with the output shown for each."""
    texts: list[tuple[list[str], list[str], int]] = []
    continued = False
    for offset, line in enumerate(block.body.splitlines()):
        if continued:
            texts[-1][0].append(line)
        elif line.startswith("$ "):
            texts.append(([line[2:]], [], block.line + offset + 1))
        elif not texts:
            raise PageError(
                f"line {block.line + offset + 1}: a console block begins with `$ command`, not with {line!r}"
            )
        else:
            texts[-1][1].append(line)
            continue
        continued = line.endswith("\\")
    whole = ["\n".join(lines) for lines, _, _ in texts]
    following = [*whole[1:], ""]
    return [
        Command(text, tuple(shown), line, may_fail=after == "echo $?")
        for text, after, (_, shown, line) in zip(whole, following, texts, strict=True)
    ]


def _pattern(shown: str) -> tuple[re.Pattern[str], list[float]]:
    """A shown line as a pattern whose groups are its numbers, and these numbers."""
    pattern, numbers, end = "", [], 0
    for match in FLOAT.finditer(shown):
        pattern += _literal(shown[end : match.start()]) + r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?))"
        numbers.append(float(match[0]))
        end = match.end()
    return re.compile(pattern + _literal(shown[end:]), re.IGNORECASE), numbers


def _literal(text: str) -> str:
    return ".*?".join(re.escape(part).replace(r"\ ", r"\s+") for part in text.split("…"))


def matches(shown: str, actual: str) -> bool:
    """Whether a line of output is what the page shows: numbers within 1 %, other text exactly, `…` anything."""
    pattern, numbers = _pattern(" ".join(shown.split()))
    found = pattern.fullmatch(" ".join(actual.split()))
    return found is not None and all(
        math.isclose(float(group), number, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)
        for group, number in zip(found.groups(), numbers, strict=True)
    )


def missing_line(shown: Sequence[str], output: str) -> str | None:
    """The first shown line that the output lacks, in this order. None if it has all."""
    actual = iter(re.split(r"[\r\n]+", output))
    for line in shown:
        if line.strip() in ("", "..."):
            continue
        if not any(matches(line, candidate) for candidate in actual):
            return line
    return None


def _accept_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Shell:
    """A bash process in a folder, like a reader's terminal. It runs commands one by one within the remaining time."""

    def __init__(self, folder: Path, code: Path, timeout_s: float) -> None:
        self._tools = tempfile.TemporaryDirectory()
        tools = Path(self._tools.name)
        self._script = tools / "command.sh"
        (tools / "torchrun").write_text(TORCHRUN.format(python=sys.executable), encoding="utf-8")
        (tools / "torchrun").chmod(0o755)
        self._mark = f"--page-{os.getpid()}-{time.monotonic_ns()}--"
        environment = user_environment(PAGE_MARK=self._mark, PYTHONUNBUFFERED="1", NO_COLOR="1", COLUMNS="120")
        environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
        environment["PYTHONPATH"] = environment["PYTHONPATH"].replace(str(PROJECT), str(code), 1)
        self._deadline = time.monotonic() + timeout_s
        self._bash = subprocess.Popen(
            ["bash", "-c", LOOP],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # As in a terminal, even if the tests run as a background job, which ignores Ctrl-C.
            preexec_fn=_accept_interrupts,
        )

    def run(self, command: str) -> Ran:
        """Run a command to its end. Raises TimeoutError past the page's time."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        self._script.write_text(f"(exit $__code)\n{command}\n", encoding="utf-8")
        began = time.monotonic()
        self._bash.stdin.write(f"{self._script}\n".encode())
        self._bash.stdin.flush()
        output = b""
        end = re.compile(rb"\n" + self._mark.encode() + rb" (\d+)\n")
        while not (found := end.search(output)):
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._bash.stdout], [], [], left)[0]:
                raise TimeoutError(
                    f"{command}\nhas not ended in time; so far it printed:\n{output.decode(errors='replace')}"
                )
            piece = os.read(self._bash.stdout.fileno(), 1 << 16)
            if not piece:
                raise PageError(f"{command}\nended the shell:\n{output.decode(errors='replace')}")
            output += piece
        return Ran(output[: found.start()].decode(errors="replace"), int(found[1]), time.monotonic() - began)

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        for number, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
            try:
                os.killpg(self._bash.pid, number)
                self._bash.communicate(timeout=wait_s)
                break
            except subprocess.TimeoutExpired:
                continue
        self._tools.cleanup()


def check(page: Path, command: Command, ran: Ran) -> None:
    """Raise PageError if a command failed or its output differs from the page."""
    where = f"{page.name}:{command.line}: $ {command.text}\n"
    if ran.code and not command.may_fail:
        raise PageError(f"{where}returned {ran.code} and printed:\n{ran.output}")
    missing = missing_line(command.shown, ran.output)
    if missing is not None:
        raise PageError(f"{where}did not print, or not in this order, the line\n  {missing}\nIt printed:\n{ran.output}")


def run_page(
    page: Path,
    folder: Path,
    *,
    on_ran: Callable[[Path, Command, Ran], None] = check,
    code: Path = PROJECT,
    timeout_s: float = PAGE_TIMEOUT_S,
) -> None:
    """Write the page's files and run its commands in page order. `on_ran` judges each completed command."""
    for name in LINKED:
        (folder / name).symlink_to(PROJECT / name)
    with Shell(folder, code, timeout_s) as shell:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.file is not None:
                _write(page, block, folder / block.file)
            elif block.language == "console":
                for command in commands(block):
                    on_ran(page, command, shell.run(command.text))
        remaining = shell.run("jobs -pr").output.split()
        if remaining:
            raise PageError(f"{page.name}: the last command leaves processes behind: {', '.join(remaining)}")


def _write(page: Path, block: Block, path: Path) -> None:
    assert block.file is not None
    if ".." in path.parts or block.file.startswith(("/", *(f"{name}/" for name in LINKED))):
        raise PageError(f"{page.name}:{block.line}: {block.file} is outside the reader's folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.content, encoding="utf-8")


def faults(page: Path) -> list[str]:
    """Blocks of a page that no test runs, although they need a run."""
    found = []
    all_blocks = blocks(page.read_text(encoding="utf-8"))
    files = [_squeezed(block.content) for block in all_blocks if block.file]
    for block in all_blocks:
        where = f"{page.name}:{block.line}"
        test = RUN_BY.fullmatch(block.comment)
        if test:
            path = PROJECT / test["test"]
            if not path.is_file():
                found.append(f"{where}: {test['test']} does not exist")
            elif page.name not in path.read_text(encoding="utf-8"):
                found.append(f"{where}: {test['test']} does not read {page.name}")
        elif block.file or block.language in ("console", "text"):
            continue
        elif block.language == "bash":
            found.append(f"{where}: a bash block needs `<!-- run by tests/system/test_x.py -->` before it")
        elif not NOT_RUN.fullmatch(block.comment) and not any(_squeezed(block.body) in one for one in files):
            found.append(
                f"{where}: this {block.language} block is no excerpt of a file of the page, and nothing runs it"
            )
    return found


def _squeezed(text: str) -> str:
    """The text without what an excerpt may omit: indentation and empty lines."""
    return "\n".join(line.strip() for line in textwrap.dedent(text).splitlines() if line.strip())


def main() -> None:
    """Run one page by hand."""
    parser = argparse.ArgumentParser(description="Runs a tutorial page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--code", type=Path, default=PROJECT, help="folder with the package to run")
    parser.add_argument("--folder", type=Path, help="an empty folder, kept; a temporary one if left out")
    parser.add_argument("--show", action="store_true", help="print each command's real output instead of comparing it")
    parser.add_argument("--timeout-s", type=float, default=PAGE_TIMEOUT_S, help="for all commands together")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="tutorial-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    failed = faults(asked.page)

    def on_ran(page: Path, command: Command, ran: Ran) -> None:
        print(f"$ {command.text}" + (f"\n{ran.output.rstrip()}" if asked.show else ""))
        print(f"    # {ran.seconds:.1f} s, returned {ran.code}", flush=True)
        try:
            check(page, dataclasses.replace(command, shown=()) if asked.show else command, ran)
        except PageError as error:
            failed.append(str(error))

    run_page(asked.page, folder.resolve(), on_ran=on_ran, code=asked.code.resolve(), timeout_s=asked.timeout_s)
    print("\n\n".join(failed) or "The page is right.", f"{time.monotonic() - began:.1f} s in {folder}", sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
