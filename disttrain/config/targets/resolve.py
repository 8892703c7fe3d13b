"""Imports the callable that a `target` names, and calls it with its `args`.

A target is a short name, `package.module:attribute`, or `package.module.attribute`. Every command searches the config's
folder, then the working directory, then installed packages. A name that does not exist, and an argument that does not
fit, are rejected with the names that do exist.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disttrain.config.problems import UnknownNameError, suggest
from disttrain.config.schema import Target
from disttrain.config.targets.source_search import find_module
from disttrain.config.targets.target_names import import_path, splits_of
from disttrain.config.values import REDACTED
from disttrain.errors import ConfigError, explain


def prefer_folder(folder: Path | None) -> None:
    """Import first from the config's folder, then from the working directory. Local; idempotent; changes `sys.path`."""
    wanted = [str(folder)] if folder is not None else []
    wanted.append(str(Path.cwd()))
    for path in reversed(wanted):
        if path in sys.path:
            sys.path.remove(path)
        sys.path.insert(0, path)


def resolve_target(target: str | Callable[..., Any], *, section: str, folder: Path | None) -> Callable[..., Any]:
    """Import the callable that `target` names. Local.

    Runs the top level of its module, whose exceptions are not caught. Raises UnknownNameError where the name does not
    exist.
    """
    if not isinstance(target, str):
        return target
    path = import_path(target, section)
    prefer_folder(folder)
    for module_name, attribute in splits_of(path):
        if not _module_exists(module_name):
            continue
        found: Any = importlib.import_module(module_name)
        if path == target:  # a short name always means disttrain's part
            _reject_namesake(section, target, module_name, folder)
        for part in attribute.split("."):
            if not hasattr(found, part):
                if ":" in path or inspect.ismodule(found):
                    known = [name for name in getattr(found, "__dict__", {}) if not name.startswith("_")]
                    raise _absent(section, target, f"{module_name} has no {part!r}", suggest(part, known[:200]))
                break
            found = getattr(found, part)
        else:
            if not callable(found):
                problem = f"{attribute} is a {type(found).__qualname__}, which cannot be called"
                raise _absent(section, target, problem, "name a class or a function")
            return found  # type: ignore[no-any-return]
    module = splits_of(path)[0][0] if ":" in path else path.split(".")[0]
    searched = f"{folder}, {Path.cwd()} or the installed packages" if folder else f"{Path.cwd()} or installed packages"
    raise _absent(section, target, f"no module {module!r} in {searched}", "correct the path, or install the package")


def build_target(
    target: Target, *positional: Any, section: str, folder: Path | None, offered: Mapping[str, Any] | None = None
) -> Any:
    """Build the targets nested in `args`, then call the target. As local or collective as the callable.

    `positional` arguments come first. Arguments in `offered` are passed if the callable has a parameter of that name.
    Raises ConfigError where the arguments do not fit. Exceptions of the callable are not caught.
    """
    call = resolve_target(target.target, section=section, folder=folder)
    args = {key: build_nested(value, section=section, folder=folder) for key, value in target.args.items()}
    names = _parameters(call)
    args |= {key: value for key, value in (offered or {}).items() if key in names and key not in args}
    check_arguments(call, positional, args, what=f"{section}.target={shown_target(target.target)}")
    return call(*positional, **args)


def build_nested(value: Any, *, section: str, folder: Path | None) -> Any:
    """Replace every mapping in a value of `args` that has a `target` by the object it builds, depth first."""
    if isinstance(value, Mapping):
        if "target" in value and set(value) <= {"target", "args"}:
            return build_target(Target(**value), section=section, folder=folder)
        return {key: build_nested(item, section=section, folder=folder) for key, item in value.items()}
    if isinstance(value, list):
        return [build_nested(item, section=section, folder=folder) for item in value]
    return value


def check_arguments(
    call: Callable[..., Any], positional: tuple[Any, ...], args: Mapping[str, Any], *, what: str
) -> None:
    """Raise ConfigError where `call(*positional, **args)` would not bind, or a secret is redacted. Calls nothing."""
    lost = [name for name, value in args.items() if _lacks_secret(value)]
    if lost:
        problem = f"{', '.join(lost)} is {REDACTED}: a saved config has no secrets"
        raise ConfigError(explain(f"Cannot call {what} with its args.", problem, "pass the value as an override"))
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # written in C: Python cannot know its arguments before the call
        return
    try:
        signature.bind(*positional, **args)
    except TypeError as error:
        problem, fix = str(error), f"it takes {signature}"
        wrong = [name for name in args if name not in signature.parameters]
        takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
        if wrong and not takes_any:
            problem, fix = f"it has no argument {wrong[0]!r}", suggest(wrong[0], signature.parameters)
        raise ConfigError(explain(f"Cannot call {what} with its args.", problem, fix)) from None


def shown_target(target: str | Callable[..., Any]) -> str:
    """A target as messages name it. Pure."""
    return target if isinstance(target, str) else f"{target.__module__}:{getattr(target, '__qualname__', target)}"


def _lacks_secret(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_lacks_secret, value.values()))
    if isinstance(value, list):
        return any(map(_lacks_secret, value))
    return isinstance(value, str) and REDACTED in value


def _parameters(call: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return set()


def _module_exists(name: str) -> bool:
    if name in sys.modules:  # __main__ and a notebook's modules have no spec
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # the parent is missing, or not a package
        return False


def _reject_namesake(section: str, target: str, module: str, folder: Path | None) -> None:
    """Reject a module of the same name that an earlier import loaded from another file.

    Python keeps one module for each name, and would return the other file's module.
    """
    if module == "__main__":
        return
    spec = find_module(module, folder or Path.cwd())
    wanted = spec.origin if spec is not None and spec.has_location else None
    loaded = getattr(sys.modules[module], "__file__", None)
    if loaded is not None and wanted is not None and not _same_file(loaded, wanted):
        problem = f"{module} is {wanted}, but this process has already loaded {loaded} under that name"
        raise _absent(section, target, problem, "rename one of the two files, or start another process")


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve().with_suffix("") == Path(other).resolve().with_suffix("")


def _absent(section: str, target: str, problem: str, fix: str) -> UnknownNameError:
    return UnknownNameError(f"Cannot import {section}.target={target!r}.", problem, fix)
