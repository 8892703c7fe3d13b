"""The package stays easy to navigate: sizes of packages, files and functions, no import circle in the benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = sorted((PROJECT / "disttrain").rglob("*.py"))
MODULES_PER_PACKAGE, LINES_PER_FILE, LINES_PER_FUNCTION = 12, 400, 60


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def too_long(source: str) -> list[str]:
    """Names of the functions in `source` that exceed the limit."""
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(ast.parse(source))}
    return [name for name, lines in lengths.items() if lines > LINES_PER_FUNCTION]


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that can reach themselves by imports."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = list(imports[start])
        while left:
            module = left.pop()
            if module in imports and module not in found:
                found.add(module)
                left += imports[module]
        return found

    return [module for module in imports if module in reached(module)]


def imports_of(source: str, package: str) -> set[str]:
    """Modules of `package` that `source` imports anywhere, also in functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            found.add(str(node.module).removeprefix(f"{package}."))
    return found


def test_packages_have_few_modules() -> None:
    sizes = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in SOURCES}}
    assert {str(folder): size for folder, size in sizes.items() if size > MODULES_PER_PACKAGE} == {}


def test_files_are_short() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > LINES_PER_FILE} == {}


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda folder: folder.name)
def test_functions_are_short(folder: Path) -> None:
    found = {path.name: too_long(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}


def test_benchmarks_have_no_import_circle() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / "benchmarks").glob("*.py")}
    assert circles({name: imports_of(source, "benchmarks") for name, source in sources.items()}) == []


def test_the_checks_notice_violations() -> None:
    long = "def f():\n" + "    pass\n" * LINES_PER_FUNCTION
    assert too_long(long) == ["f"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert imports_of("def f():\n    from pack.x import y\nfrom pack import z\n", "pack") == {"x", "z"}
