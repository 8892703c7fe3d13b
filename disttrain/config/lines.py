"""YAML with the line of every key, safe, and strict where YAML is lax: keys are text, and none comes twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from disttrain.config.faults import ConfigFaultsError, Fault, shown

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `3e-4` as a number: YAML 1.1 wants `3.0e-4`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass
class Document:
    """A file's value and, for each path in it, the line it stands on (counted from 1)."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)


def parse_document(text: str, name: str) -> Document:
    """Parse one YAML document. Pure; raises ConfigFaultsError for what is not YAML or says a key twice."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(None)
        faults: list[Fault] = []
        if node is not None:
            document.value = _read(loader, node, (), document.lines, faults, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        found = str(getattr(error, "problem", None) or error).replace("\n", " ")
        raise ConfigFaultsError([Fault("", where, f"not YAML: {found}", "mend the line; indent with spaces")]) from None
    if faults:
        raise ConfigFaultsError(faults)
    return document


def parse_value(text: str) -> Any:
    """An override's value, by the same rules. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def _read(loader: _Loader, node: Any, path: Path, lines: dict[Path, int], faults: list[Fault], name: str) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_read(loader, item, (*path, i), lines, faults, name) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    first: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in first:
            dotted, where = ".".join(map(str, (*path, key_node.value))), f"{name}:{line}"
            faults.append(Fault(dotted, where, f"the key of line {first[key_node.value]} again", "keep one of the two"))
        first.setdefault(str(key_node.value), line)
    loader.flatten_mapping(node)
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            dotted = ".".join(map(str, (*path, key)))
            faults.append(
                Fault(dotted, f"{name}:{line}", f"the key {shown(key)}, which YAML reads as no text", "quote it")
            )
        found[str(key)] = _read(loader, value_node, (*path, str(key)), lines, faults, name)
        lines[(*path, str(key))] = line
    return found
