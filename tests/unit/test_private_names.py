"""No private name of torch is used outside `disttrain/torch_internals`, nor of DeepSpeed outside its one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "disttrain"

INTERNALS = ("torch_internals/", "strategy/deepspeed/deepspeed_internals.py")
"""Where private names of torch and of DeepSpeed may be used."""

OTHER_LIBRARIES = {
    "_exit": "os._exit is documented",
    "_run_exitfuncs": "atexit, of Python itself",
    "_strip_protocol": "fsspec",
    "_tp_plan": "an attribute that Hugging Face models bring",
}

OURS_IN_OTHER_FILES = {"_commit", "_folder", "_sources"}
"""Private names of disttrain that a neighbouring module uses."""

BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "private", "reader")


def is_private(name: str) -> bool:
    return any(part.startswith("_") and part != "_" and not part.startswith("__") for part in name.split("."))


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def uses_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each private name that a file imports, or reads from an object or module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            yield from ((node.lineno, text) for text in texts)


def foreign_names(files: dict[str, str]) -> list[str]:
    """`PATH:LINE NAME` of each private name in source texts that no file of ours defines."""
    trees = {path: ast.parse(text) for path, text in files.items()}
    ours = {path: defined_in(tree) for path, tree in trees.items()}
    anywhere = set().union(*ours.values())
    found = []
    for path, tree in trees.items():
        selves = {
            (node.lineno, node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
        }
        for line, name in uses_in(tree):
            known = anywhere if (line, name) in selves else ours[path] | OURS_IN_OTHER_FILES
            if is_private(name) and name not in known and name not in OTHER_LIBRARIES and "disttrain" not in name:
                found.append(f"{path}:{line} {name}")
    return found


def test_private_names_of_torch_are_used_in_one_package() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert len(files) > 100
    found = foreign_names(files)
    inside = [one for one in found if one.startswith(INTERNALS)]
    assert inside, "the check sees the names that are there"
    assert [one for one in found if one not in inside] == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._foreach_mul_([], 2.0)",
        "from torch._utils import _flatten_dense_tensors",
        "from torch.utils import _pytree",
        "import torch._inductor.config",
        "def f(module):\n    return module._parameters",
        "def f(tensor):\n    return getattr(tensor, '_version', None)",
        "from operator import attrgetter\nread = attrgetter('grad._version')",
        "class Norm(Base):\n    def forward(self, x):\n        return self._check_input_dim(x)",
        "def f(optimizer):\n    optimizer._opt_called = True",
    ],
)
def test_the_check_finds_a_planted_name(text: str) -> None:
    files = {"strategy/none.py": text, "other.py": "class Other:\n    def _mine(self):\n        return self._mine"}
    assert len(foreign_names(files)) == 1


def test_private_names_of_disttrain_are_allowed() -> None:
    text = (
        "class A:\n    def __init__(self, b):\n        self._b = b\n    def same(self, other):\n        return other._b"
    )
    assert foreign_names({"a.py": text}) == []
