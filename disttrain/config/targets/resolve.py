"""From a `target` to the thing it names: short names, `package.module:attribute`, or all dots.

Paths resolve from the config's folder, then the working directory, then what is installed, equally for all commands.
Refuses what cannot be found and arguments that do not fit, with what is there instead.
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
    """Make the config's folder, then the working directory, the first places to import from. Local; idempotent."""
    wanted = [str(folder)] if folder is not None else []
    wanted.append(str(Path.cwd()))
    for place in reversed(wanted):
        if place in sys.path:
            sys.path.remove(place)
        sys.path.insert(0, place)


def resolve_target(target: str | Callable[..., Any], *, section: str, folder: Path | None) -> Callable[..., Any]:
    """Import what `target` names. Local; runs the module's own top level, whose exceptions come through."""
    if not isinstance(target, str):
        return target
    path = import_path(target, section)
    prefer_folder(folder)
    for module_name, attribute in splits_of(path):
        if not _module_exists(module_name):
            continue
        found: Any = importlib.import_module(module_name)
        if path == target:  # a short name means our own part, whatever else lies about
            _refuse_namesake(section, target, module_name, folder)
        for part in attribute.split("."):
            if not hasattr(found, part):
                if ":" in path or inspect.ismodule(found):
                    known = [name for name in getattr(found, "__dict__", {}) if not name.startswith("_")]
                    raise _absent(section, target, f"{module_name} has no {part!r}", suggest(part, known[:200]))
                break
            found = getattr(found, part)
        else:
            if not callable(found):
                raise _absent(section, target, f"a {type(found).__qualname__}, which cannot be called", "name a class")
            return found  # type: ignore[no-any-return]
    module = splits_of(path)[0][0] if ":" in path else path.split(".")[0]
    places = f"{folder}, {Path.cwd()} and what is installed" if folder else f"{Path.cwd()} and what is installed"
    raise _absent(section, target, f"no module {module!r} in {places}", "mend the path, or install the package")


def build_target(
    target: Target, *positional: Any, section: str, folder: Path | None, offered: Mapping[str, Any] | None = None
) -> Any:
    """Build nested targets inside `args`, then call. `offered` arguments are passed where the callable names them.

    Raises ConfigError where the arguments do not fit; what the callable itself raises comes through.
    """
    call = resolve_target(target.target, section=section, folder=folder)
    args = {key: build_nested(value, section=section, folder=folder) for key, value in target.args.items()}
    names = _parameters(call)
    args |= {key: value for key, value in (offered or {}).items() if key in names and key not in args}
    check_arguments(call, positional, args, what=f"{section}.target={shown_target(target.target)}")
    return call(*positional, **args)


def build_nested(value: Any, *, section: str, folder: Path | None) -> Any:
    """A value of `args` with every mapping that has a `target` built, depth first."""
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
    """Raise ConfigError where `call(*positional, **args)` could not bind, or a secret is missing. Calls nothing."""
    lost = [name for name, value in args.items() if _lacks_secret(value)]
    if lost:
        found = f"{REDACTED} for {', '.join(lost)}: what is saved with a run holds no secrets"
        raise ConfigError(explain(f"{what} is called with its args.", found, "give the value again, by an override"))
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # written in C: Python cannot know its arguments before the call
        return
    try:
        signature.bind(*positional, **args)
    except TypeError as error:
        found, do = str(error), f"it takes {signature}"
        wrong = [name for name in args if name not in signature.parameters]
        takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
        if wrong and not takes_any:
            found, do = f"no argument {wrong[0]!r}", suggest(wrong[0], signature.parameters)
        raise ConfigError(explain(f"{what} is called with its args.", found, do)) from None


def shown_target(target: str | Callable[..., Any]) -> str:
    """A target as a message names it. Pure."""
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
    except (ImportError, ValueError):  # a parent that is no package, or is not there
        return False


def _refuse_namesake(section: str, target: str, module: str, folder: Path | None) -> None:
    """Python keeps one module a name: what an earlier import left there must not stand in for the config's own."""
    if module == "__main__":
        return
    spec = find_module(module, folder or Path.cwd())
    wanted = spec.origin if spec is not None and spec.has_location else None
    loaded = getattr(sys.modules[module], "__file__", None)
    if loaded is not None and wanted is not None and not _same_file(loaded, wanted):
        found = f"{wanted}, but this process has loaded {loaded} under that name"
        raise _absent(section, target, found, "rename one of the two, or use a process of its own")


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve().with_suffix("") == Path(other).resolve().with_suffix("")


def _absent(section: str, target: str, found: str, do: str) -> UnknownNameError:
    return UnknownNameError(f"{section}.target={target!r} is to be imported.", found, do)
