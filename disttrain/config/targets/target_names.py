"""What a target's text says before anything is looked for: short names, import paths, where targets stand. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.problems import UnknownNameError, suggest
from disttrain.config.targets.short_names import NAMES

_PATH = "write an import path: package.module:attribute"
_PATH_ONLY = {"optim": "write an import path, as torch.optim.AdamW is"}
_SECTIONS = ("model", "objective", "data", "eval", "optim", "schedule", "report")


def section_of(path: tuple[Any, ...]) -> str:
    """Whose short names count at `path`: evaluation sets are data; nested targets have import paths only."""
    return {"eval": "data", "report": "trackers"}.get(str(path[0]), str(path[0]))


def targets_in(values: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], str, Mapping[str, Any]]]:
    """(path of the text, target, args) of every target in a config's values, nested ones and bare trackers too."""
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
        # `args` themselves may have an argument of the name target; inside them only what `build_nested` builds counts.
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
    """A short name's import path; a path as it is. Raises UnknownNameError for what is neither."""
    names = NAMES.get(section, {})
    if target in names:
        return names[target]
    asked = f"{section}.target={target!r} is to name a part."
    if ":" not in target and "." not in target:
        do = f"{suggest(target, names)}; or write package.module:attribute" if names else _PATH_ONLY.get(section, _PATH)
        raise UnknownNameError(asked, f"no short name of the section {section!r}", do)
    module, colon, attribute = target.partition(":")
    names_in = [*module.split("."), *(attribute.split(".") if colon else [])]
    # what Python itself writes for a callable that was handed over: `module:make.<locals>.Net`
    if not all(one.isidentifier() or one.startswith("<") for one in names_in):
        raise UnknownNameError(asked, "no import path", "write package.module:attribute")
    return target


def splits_of(path: str) -> list[tuple[str, str]]:
    """(module, attribute) as `path` may be read: one way with a colon, else every dot, longest module first. Pure."""
    if ":" in path:
        module, _, attribute = path.partition(":")
        return [(module, attribute)]
    parts = path.split(".")
    return [(".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts) - 1, 0, -1)]
