"""Finds the targets in a config, and turns short names into import paths. Pure: nothing is imported or searched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.problems import UnknownNameError, suggest
from disttrain.config.targets.short_names import NAMES

_PATH = "write an import path: package.module:attribute"
_PATH_ONLY = {"optim": "write an import path such as torch.optim.AdamW"}
_SECTIONS = ("model", "objective", "data", "eval", "optim", "schedule", "report")


def section_of(path: tuple[Any, ...]) -> str:
    """The section whose short names apply at `path`: evaluation sets are data. Nested targets have none. Pure."""
    return {"eval": "data", "report": "trackers"}.get(str(path[0]), str(path[0]))


def targets_in(values: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], str, Mapping[str, Any]]]:
    """(path, target, args) of every target in a config's values, including nested targets and bare trackers. Pure."""
    for section in _SECTIONS:
        yield from _targets(values.get(section), (section,))
    report = values.get("report")
    trackers = report.get("trackers") if isinstance(report, Mapping) else None
    for index, item in enumerate(trackers if isinstance(trackers, list) else ()):
        if isinstance(item, str):
            yield ("report", "trackers", index), item, {}


def _targets(
    value: Any, path: tuple[Any, ...], *, in_args: bool = False
) -> Iterator[tuple[tuple[Any, ...], str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        # `args` may have an argument named target. Inside them, only mappings that `build_nested` builds are targets.
        built = not in_args or set(value) <= {"target", "args"}
        if built and isinstance(value.get("target"), str):
            yield (*path, "target"), value["target"], _mapping(value.get("args"))
        for key, item in value.items():
            if key == "args" and built and isinstance(item, Mapping):
                for name, argument in item.items():
                    yield from _targets(argument, (*path, key, name), in_args=True)
            else:
                yield from _targets(item, (*path, key), in_args=in_args)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _targets(item, (*path, index), in_args=in_args)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def import_path(target: str, section: str) -> str:
    """The import path of a short name; an import path is returned unchanged. Pure; raises UnknownNameError."""
    names = NAMES.get(section, {})
    if target in names:
        return names[target]
    failed = f"Cannot resolve {section}.target={target!r}."
    if ":" not in target and "." not in target:
        fix = (
            f"{suggest(target, names)}; or write package.module:attribute" if names else _PATH_ONLY.get(section, _PATH)
        )
        raise UnknownNameError(failed, f"not a short name of the section {section!r}", fix)
    module, colon, attribute = target.partition(":")
    names_in = [*module.split("."), *(attribute.split(".") if colon else [])]
    # Python names a callable that was passed as an object like this: `module:make.<locals>.Net`.
    if not all(one.isidentifier() or one.startswith("<") for one in names_in):
        raise UnknownNameError(failed, "not an import path", "write package.module:attribute")
    return target


def splits_of(path: str) -> list[tuple[str, str]]:
    """The (module, attribute) pairs that `path` may mean. Pure.

    A colon leaves one. Without a colon, every dot may separate them, and the longest module comes first.
    """
    if ":" in path:
        module, _, attribute = path.partition(":")
        return [(module, attribute)]
    parts = path.split(".")
    return [(".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts) - 1, 0, -1)]
