"""Parses YAML safely, and records the line of every key. Keys must be strings, and none may occur twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from disttrain.config.problems import ConfigProblem, ConfigProblemsError, dotted

KeyPath = tuple[str | int, ...]

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_MERGE_TAG = "tag:yaml.org,2002:merge"
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Loads the types of JSON: `3e-4` is a number (YAML 1.1 requires `3.0e-4`), and `2026-01-31` is text."""


_Loader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in {None, *_PLAIN_TAGS}
}
_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0] in {*_PLAIN_TAGS, _MERGE_TAG}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged: the text `3e-4` is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _write_text(self, text: str) -> yaml.ScalarNode:
        """Escape line breaks: a key cannot span lines, and a value's comment must be on its line."""
        breaks = text.splitlines() not in ([], [text])
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper._write_text)
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


@dataclass
class Document:
    """A file's value, the line of each path in it (from 1), and the problems that left a value to check."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)


def parse_document(text: str, name: str) -> Document:
    """Parse one YAML document. Pure; raises ConfigProblemsError with the line where the text is not YAML."""
    document = Document(None)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _Reader(loader, document, name).read(node, (), ())
    except yaml.YAMLError as error:
        raise ConfigProblemsError([_not_yaml(error, text, name)]) from None
    except RecursionError:
        problem, fix = "values nested too deep to read", "reduce the nesting"
        raise ConfigProblemsError([ConfigProblem("", f"{name}:1", problem, fix)]) from None
    return document


def parse_value(text: str) -> Any:
    """Parse an override's value by the same rules. Pure; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def write_value(value: Any) -> str:
    """A plain value in YAML's flow style, on one line. `parse_value` reads it back unchanged. Pure."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("...\n").removesuffix("\n")


def _not_yaml(error: yaml.YAMLError, text: str, name: str) -> ConfigProblem:
    mark = getattr(error, "problem_mark", None)
    position = getattr(error, "position", None)
    line = mark.line + 1 if mark is not None else 1
    if isinstance(position, int):  # a character that YAML does not allow has a position, but no mark
        line = text.count("\n", 0, position) + 1
    reason = str(getattr(error, "problem", None) or error).split("\n")[0]
    fix = "correct that line or the one above; indent with spaces"
    return ConfigProblem("", f"{name}:{line}", f"not YAML: {reason}", fix)


class _Reader:
    """Builds a value from YAML nodes, and records lines and problems in `document`."""

    def __init__(self, loader: _Loader, document: Document, name: str) -> None:
        self._loader, self._document, self._name = loader, document, name

    def read(self, node: Any, path: KeyPath, around: tuple[int, ...]) -> Any:
        """The value of `node`. `around` are the ids of the nodes that contain it, to detect recursive anchors."""
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in around:
            self._report(path, node, "an anchor that contains itself", "write the value without the anchor")
            return None
        if node.tag not in _PLAIN_TAGS:
            fix = "remove the tag; name code by `target`"
            self._report(path, node, f"the tag {node.tag} is not supported", fix)
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        around = (*around, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, i), around) for i, item in enumerate(node.value)]
        return self._mapping(node, path, around)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except (ValueError, KeyError) as error:  # an explicit tag on a text that does not fit it
            kind = node.tag.rpartition(":")[2]
            problem = f"{node.value[:40]!r} is not a value of type {kind}: {error}"
            self._report(path, node, problem, "correct the value, or remove the tag")
            return None

    def _mapping(self, node: Any, path: KeyPath, around: tuple[int, ...]) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:  # before merge keys (<<) are resolved, whose keys may occur again
            key, line = self._key(key_node), key_node.start_mark.line + 1
            if key in seen:
                self._report((*path, key), key_node, f"the key of line {seen[key]} again", "keep one of the two")
            seen.setdefault(key, line)
        self._loader.flatten_mapping(node)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key_node.tag != "tag:yaml.org,2002:str":
                self._report((*path, key), key_node, f"YAML does not read the key {key} as text", "quote it")
            self._document.lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = self.read(value_node, (*path, key), around)
        return found

    @staticmethod
    def _key(node: Any) -> str:
        return node.value if isinstance(node, yaml.ScalarNode) else f"({node.id})"

    def _report(self, path: KeyPath, node: Any, problem: str, fix: str) -> None:
        where = f"{self._name}:{node.start_mark.line + 1}"
        self._document.problems.append(ConfigProblem(dotted(path), where, problem, fix))
