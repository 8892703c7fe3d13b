"""Whether a target is there, seen from its source alone: finds the file, parses it, runs nothing.

What lies in compiled modules, or is made by code at import, is not judged: `check --import` goes further.
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

from disttrain.config.problems import Fault, dotted, shown, suggest
from disttrain.config.render import source_of
from disttrain.config.targets.target_names import import_path, section_of, splits_of, targets_in
from disttrain.errors import ConfigError

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)
_HOPS = 8
"""How many modules may hand a name on: `torch.optim.AdamW` takes one; a circle of imports ends here."""


def find_faults(values: Mapping[str, Any], sources: Mapping[str, str], folder: Path) -> list[Fault]:
    """Every target that is not where it says, or whose arguments its source does not take. Local.

    `values` is a config's values, valid or not; unknown short names are load_config's to tell.
    """
    faults: list[Fault] = []
    for path, target, args in targets_in(values):
        section = section_of(path)
        try:
            collates = section == "data" and path[-2] == "collate"  # may be the function itself, not what makes one
            wrong = _look(import_path(target, section), folder, args, "objective" if collates else section)
        except ConfigError:
            continue
        if wrong is not None:
            here = path if wrong.argument is None else (*path[:-1], "args", wrong.argument)
            where = source_of(tuple(map(str, here)), sources)
            faults.append(Fault(dotted(here), where, f"{target!r}: {wrong.found}", wrong.do))
    return faults


@dataclass(frozen=True)
class _Wrong:
    """What is wrong with a target, and which of its arguments it is, if one."""

    found: str
    do: str
    argument: str | None = None


def _look(path: str, folder: Path, args: Mapping[str, Any], section: str) -> _Wrong | None:
    for module, attribute in splits_of(path):
        spec = find_module(module, folder)
        if spec is None:
            if module in sys.modules:  # made by Python itself: __main__, a notebook's cells
                return None
            continue
        source = _source(spec)
        if source is None or "<" in attribute:  # compiled, or a name that only a running program has
            return None
        try:
            tree = _parse(source)
        except SyntaxError as error:
            return _Wrong(f"{spec.origin}:{error.lineno} does not parse: {error.msg}", "mend that line")
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
    places = dict.fromkeys((str(folder), str(Path.cwd())))
    found = f"no module {module!r} in {', '.join(places)} or what is installed"
    return _Wrong(found, "mend the path, or install the package")


def find_module(name: str, folder: Path) -> ModuleSpec | None:
    """The module's spec, without importing it or its parents."""
    places: list[str] | None = [str(folder), str(Path.cwd()), *sys.path]
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for at in range(len(parts)):
        if places is None:
            return None
        whole = ".".join(parts[: at + 1])
        spec = PathFinder.find_spec(whole, places) or (_found_otherwise(whole) if at == 0 else None)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
    return spec


def _found_otherwise(name: str) -> ModuleSpec | None:
    """A top-level module that no folder holds: built in, or installed in editable form."""
    for finder in sys.meta_path:
        if finder is not PathFinder and (spec := finder.find_spec(name, None)) is not None:
            return spec
    return None


def _source(spec: ModuleSpec) -> str | None:
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8", errors="replace")


def _parse(source: str) -> ast.Module:
    """The source's tree. Raises SyntaxError; what Python only warns of is not ours to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _names(tree: ast.Module) -> tuple[dict[str, ast.stmt | None], bool]:
    """The module's names, each with its statement where it is bound only once, and whether code may add more."""
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
    """The nodes whose names are the module's: nothing inside its functions, classes and comprehensions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, _SCOPES):
            yield from _module_scope(child)


def _adds_names(node: ast.AST) -> bool:
    """Whether this is how code adds names that its text does not show."""
    if isinstance(node, ast.Name):
        return node.id in ("globals", "exec")
    return isinstance(node, ast.Attribute) and node.attr == "modules" and getattr(node.value, "id", "") == "sys"


def _followed(statement: ast.stmt | None, name: str, spec: ModuleSpec, folder: Path) -> ast.stmt | None:
    """The definition behind a name that its module took from another, as far as the sources show it."""
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
    """Names of `args` against a plain function, or a class with an `__init__` of its own."""
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
        return _Wrong(f"no argument {unknown[0]!r} (value {value})", suggest(unknown[0], names), unknown[0])
    if section in ("model", "data"):
        required = [one.arg for one in given.args][offset : len(given.args) - len(given.defaults)]
        required += [
            one.arg for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None
        ]
        missing = [name for name in required if name not in args]
        if missing:
            return _Wrong(f"no value for its argument(s) {', '.join(missing)}", "add them under args")
    return None
