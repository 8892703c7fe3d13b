"""Checks that targets exist by parsing their source files. Runs no user code.

Names in compiled modules, and names that code creates at import, are not checked. `disttrain check --import` checks
them too.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from disttrain.config.problems import ConfigProblem, dotted, shown, suggest
from disttrain.config.render import source_of
from disttrain.config.targets.target_names import import_path, section_of, splits_of, targets_in
from disttrain.errors import ConfigError

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)
_HOPS = 8
"""How many re-exports are followed: `torch.optim.AdamW` needs one. The limit also ends a circle of imports."""


def find_target_problems(values: Mapping[str, Any], sources: Mapping[str, str], folder: Path) -> list[ConfigProblem]:
    """Every target that does not exist, or whose source does not accept its arguments. Local; reads the disk.

    `values` are a config's values, valid or not. `load_config` reports unknown short names.
    """
    problems: list[ConfigProblem] = []
    for path, target, args in targets_in(values):
        section = section_of(path)
        try:
            collates = section == "data" and path[-2] == "collate"  # may name the function itself, not its factory
            wrong = _look(import_path(target, section), folder, args, "objective" if collates else section)
        except ConfigError:
            continue
        if wrong is not None:
            here = path if wrong.argument is None else (*path[:-1], "args", wrong.argument)
            where = source_of(tuple(map(str, here)), sources)
            problems.append(ConfigProblem(dotted(here), where, f"{target!r}: {wrong.problem}", wrong.fix))
    return problems


@dataclass(frozen=True)
class _Wrong:
    """The problem of a target, its fix and, if the problem is an argument, the argument's name."""

    problem: str
    fix: str
    argument: str | None = None


def _look(path: str, folder: Path, args: Mapping[str, Any], section: str) -> _Wrong | None:
    for module, attribute in splits_of(path):
        spec = find_module(module, folder)
        if spec is None:
            if module in sys.modules:  # without a file: __main__, a notebook's cells
                return None
            continue
        source = _source(spec)
        if source is None or "<" in attribute:  # compiled, or a name that exists only at run time
            return None
        try:
            tree = _parse(source)
        except SyntaxError as error:
            return _Wrong(f"{spec.origin}:{error.lineno} does not parse: {error.msg}", "correct that line")
        known, open_ended = _names(tree)
        first, _, rest = attribute.partition(".")
        if first in known:
            definition = _followed(known[first], first, spec, folder)
            return _check_args(definition, args, section) if definition is not None and not rest else None
        if open_ended or find_module(f"{module}.{first}", folder) is not None:
            return None
        return _Wrong(
            f"{spec.origin} has no {first!r}", suggest(first, [one for one in known if not one.startswith("_")])
        )
    module = splits_of(path)[0][0] if ":" in path else path.split(".")[0]
    searched = dict.fromkeys((str(folder), str(Path.cwd())))
    problem = f"no module {module!r} in {', '.join(searched)} or the installed packages"
    return _Wrong(problem, "correct the path, or install the package")


def find_module(name: str, folder: Path) -> ModuleSpec | None:
    """The spec of a module, without an import of it or its parents. Local; reads the disk."""
    folders: list[str] | None = [str(folder), str(Path.cwd()), *sys.path]
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for at in range(len(parts)):
        if folders is None:
            return None
        full_name = ".".join(parts[: at + 1])
        spec = PathFinder.find_spec(full_name, folders) or (_find_without_folder(full_name) if at == 0 else None)
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
    return spec


def _find_without_folder(name: str) -> ModuleSpec | None:
    """The spec of a top-level module that is in no folder: built in, or installed in editable mode."""
    for finder in sys.meta_path:
        if finder is not PathFinder and (spec := finder.find_spec(name, None)) is not None:
            return spec
    return None


def _source(spec: ModuleSpec) -> str | None:
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8", errors="replace")


def _parse(source: str) -> ast.Module:
    """The syntax tree of a source. Raises SyntaxError; Python's warnings about user code are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _names(tree: ast.Module) -> tuple[dict[str, ast.stmt | None], bool]:
    """The names that a module defines, and whether its code may add others at run time.

    A name that is bound once maps to its statement, other names map to None.
    """
    known: dict[str, ast.stmt | None] = {}
    direct = set(tree.body)
    for node in _module_scope(tree):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom | ast.Import):
            found = [alias.asname or alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found = [node.id]
        certain = node if isinstance(node, ast.stmt) and node in direct else None
        for name in found:
            known[name] = None if name in known else certain
    everywhere = list(ast.walk(tree))
    known |= {name: None for node in everywhere if isinstance(node, ast.Global) for name in node.names}
    return known, bool({"*", "__getattr__"} & set(known)) or any(map(_adds_names, everywhere))


def _module_scope(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes in the module's scope: none inside its functions, classes and comprehensions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, _SCOPES):
            yield from _module_scope(child)


def _adds_names(node: ast.AST) -> bool:
    """Whether this node may add names to the module that its source does not show."""
    if isinstance(node, ast.Name):
        return node.id in ("globals", "exec")
    return isinstance(node, ast.Attribute) and node.attr == "modules" and getattr(node.value, "id", "") == "sys"


def _followed(statement: ast.stmt | None, name: str, spec: ModuleSpec, folder: Path) -> ast.stmt | None:
    """The definition of a name that its module imports from another, or None where the sources do not show it."""
    for _ in range(_HOPS):
        if not isinstance(statement, ast.ImportFrom):
            break
        name = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        package = spec.name if spec.submodule_search_locations is not None else spec.parent
        try:
            home = resolve_name("." * statement.level + (statement.module or ""), package)
        except ImportError:  # above the top
            return None
        found = find_module(home, folder)
        source = _source(found) if found is not None else None
        if found is None or source is None:
            return None
        try:
            statement, spec = _names(_parse(source))[0].get(name), found
        except SyntaxError:
            return None
    return statement


def _check_args(definition: ast.stmt, args: Mapping[str, Any], section: str) -> _Wrong | None:
    """Check the names in `args` against a plain function, or a class that defines `__init__`."""
    offset = 0
    if isinstance(definition, ast.ClassDef):
        own = [node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        if not own or own[0].decorator_list or definition.decorator_list or definition.keywords:
            return None
        definition, offset = own[0], 1
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    given = definition.args
    if given.kwarg is not None:
        return None
    names = [one.arg for one in (*given.posonlyargs, *given.args)][offset:] + [one.arg for one in given.kwonlyargs]
    unknown = [name for name in args if name not in names]
    if unknown:
        value = shown(args[unknown[0]], unknown[0])
        return _Wrong(f"it has no argument {unknown[0]!r} (value {value})", suggest(unknown[0], names), unknown[0])
    if section in ("model", "data"):
        required = [one.arg for one in given.args][offset : len(given.args) - len(given.defaults)]
        required += [
            one.arg for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None
        ]
        missing = [name for name in required if name not in args]
        if missing:
            return _Wrong(f"its argument(s) {', '.join(missing)} have no value", "add them under args")
    return None
