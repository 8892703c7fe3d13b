"""Every page of docs/tutorials is run as a reader would: its files, its commands, what they print."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from launched import PROJECT
from tutorial import PAGE_TIMEOUT_S, PageError, blocks, commands, faults, matches, missing_line, run_page

PAGES = sorted((PROJECT / "docs" / "tutorials").glob("*.md"))
BY_CI = [pytest.param(page, marks=pytest.mark.slow) if page.stem.startswith("from-") else page for page in PAGES]
"""CI runs the pages that every reader starts with. The three pages about moving from another library take minutes."""


@pytest.mark.timeout(PAGE_TIMEOUT_S + 60)
@pytest.mark.parametrize("page", BY_CI, ids=lambda page: page.stem)
def test_page_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_is_run(page: Path) -> None:
    assert faults(page) == []


def written(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def run(tmp_path: Path, text: str, timeout_s: float = 30.0) -> None:
    page = written(tmp_path, text)
    folder = tmp_path / "folder"
    folder.mkdir()
    run_page(page, folder, timeout_s=timeout_s)


def test_a_page_uses_one_terminal(tmp_path: Path) -> None:
    run(
        tmp_path,
        "```json\n# file: sub/a.json\n{}\n```\n\n```console\n$ cd sub; export B=1\n$ cat a.json; echo 1.001 \\\n"
        "    $B\n{}\n...\n1.0 1\n$ false\n$ echo $?\n1\n```\n",
    )


@pytest.mark.parametrize(
    ("console", "complaint"),
    [
        ("$ echo a\nb", "did not print"),
        ("$ printf 'a\\nb\\n'\nb\na", "did not print"),
        ("$ echo 1.02\n1.00", "did not print"),
        ("$ echo step 12\nstep 11", "did not print"),
        ("$ exit 3\n", "ended the shell"),
        ("$ (exit 3)\n", "returned 3"),
        ("$ sleep 60 &\n", "leaves processes behind"),
        ("output first", "begins with"),
    ],
)
def test_a_wrong_page_fails(tmp_path: Path, console: str, complaint: str) -> None:
    with pytest.raises(PageError, match=complaint):
        run(tmp_path, f"```console\n{console}\n```\n")


def test_commands_accept_ctrl_c_where_the_tests_ignore_it(tmp_path: Path) -> None:
    python = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(tmp_path, f"```console\n$ python -c '{python}'\nFalse\n```\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_that_hangs_is_killed(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        run(tmp_path, "```console\n$ sleep 60\n```\n", timeout_s=1.0)


def test_a_page_writes_only_into_its_folder(tmp_path: Path) -> None:
    for name in ("../x.py", "/tmp/x.py", "configs/x.yaml"):
        (tmp_path / name.replace("/", "_")).mkdir()
        with pytest.raises(PageError, match="outside"):
            run(tmp_path / name.replace("/", "_"), f"```python\n# file: {name}\n```\n")


def test_numbers_may_differ_by_one_percent_and_text_may_not() -> None:
    assert matches("loss 0.693  step 10", "loss 0.6931 step 10")
    assert not matches("loss 0.693 step 10", "loss 0.701 step 10")
    assert not matches("loss 0.693 step 10", "loss 0.693 step 11")
    assert matches("10 steps, … s, done", "10 steps, 3.2 s, done")
    assert matches("torch 2.13.0", "torch 2.13.0")
    assert not matches("saved", "saved 3")


def test_shown_lines_come_in_order_and_others_may_come_between() -> None:
    assert missing_line(["a", "...", "c"], "a\nb\nc\n") is None
    assert missing_line(["a", "c"], "x\ra\nb\nc") is None
    assert missing_line(["c", "a"], "a\nb\nc") == "a"


def test_blocks_that_no_test_runs_are_named(tmp_path: Path) -> None:
    def faults_of(text: str) -> list[str]:
        return faults(written(tmp_path, text))

    assert len(faults_of("```bash\nls\n```\n")) == 1
    assert len(faults_of("<!-- run by tests/system/test_no_such.py -->\n```bash\nls\n```\n")) == 1
    assert len(faults_of("<!-- run by tests/system/test_slurm.py -->\n```bash\nls\n```\n")) == 1  # it reads no page.md
    assert len(faults_of("```python\na = 2\n```\n")) == 1
    assert faults_of("```python\n# file: a.py\nif x:\n    a = 2\n```\n\n```python\na = 2\n```\n") == []
    assert faults_of("<!-- not run: Lightning is not installed -->\n```python\na = 2\n```\n") == []


def test_lines_of_a_page_are_counted(tmp_path: Path) -> None:
    block = blocks("one\n\n```console\n$ a\nb\n$ c\n```\n")[0]
    assert [(one.text, one.shown, one.line) for one in commands(block)] == [("a", ("b",), 4), ("c", (), 6)]
