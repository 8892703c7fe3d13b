"""YAML with the line of every key, safe, and strict where YAML is lax: keys are text, and none comes twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from disttrain.config.problems import ConfigFaultsError, Fault, dotted

KeyPath = tuple[str | int, ...]

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_MERGE_TAG = "tag:yaml.org,2002:merge"
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader for JSON's kinds of values: `3e-4` is a number (YAML 1.1 wants `3.0e-4`), `2026-01-31` is text."""


_Loader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in {None, *_PLAIN_TAGS}
}
_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0] in {*_PLAIN_TAGS, _MERGE_TAG}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """What writes for `_Loader`: the text `3e-4` is quoted, so that it reads back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _write_text(self, text: str) -> yaml.ScalarNode:
        """Line breaks as escapes: a key cannot span lines, and a value's comment belongs on its line."""
        breaks = text.splitlines() not in ([], [text])
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper._write_text)
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


@dataclass
class Document:
    """A file's value, the line of each path in it (counted from 1), and the faults that left a value to look at."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def parse_document(text: str, name: str) -> Document:
    """Parse one YAML document. Pure; raises ConfigFaultsError with the line for what is not YAML."""
    document = Document(None)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _Reader(loader, document, name).read(node, (), ())
    except yaml.YAMLError as error:
        raise ConfigFaultsError([_not_yaml(error, text, name)]) from None
    except RecursionError:
        found, do = "values nested too deep to read", "nest less deep"
        raise ConfigFaultsError([Fault("", f"{name}:1", found, do)]) from None
    return document


def parse_value(text: str) -> Any:
    """An override's value, by the same rules. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def write_value(value: Any) -> str:
    """A plain value in YAML's flow style, on one line, that `parse_value` reads back as itself. Pure."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("...\n").removesuffix("\n")


def _not_yaml(error: yaml.YAMLError, text: str, name: str) -> Fault:
    mark = getattr(error, "problem_mark", None)
    position = getattr(error, "position", None)
    line = mark.line + 1 if mark is not None else 1
    if isinstance(position, int):  # a character that YAML does not allow: no mark, but where it stands
        line = text.count("\n", 0, position) + 1
    found = str(getattr(error, "problem", None) or error).split("\n")[0]
    return Fault("", f"{name}:{line}", f"not YAML: {found}", "mend that line or the one above; indent with spaces")


class _Reader:
    """Builds a value from YAML's nodes, noting lines and faults in `document`."""

    def __init__(self, loader: _Loader, document: Document, name: str) -> None:
        self._loader, self._document, self._name = loader, document, name

    def read(self, node: Any, path: KeyPath, around: tuple[int, ...]) -> Any:
        """The value of `node`; `around` are the nodes it stands in, so that no anchor can hold itself."""
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in around:
            self._fault(path, node, "an anchor that contains itself", "write the value out")
            return None
        if node.tag not in _PLAIN_TAGS:
            do = "take the tag away; code is named by target"
            self._fault(path, node, f"the tag {node.tag}, which is not read", do)
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
        except (ValueError, KeyError) as error:  # a tag of its own on a text that does not fit it
            self._fault(
                path, node, f"{node.value[:40]!r}, which is no {node.tag.rpartition(':')[2]}: {error}", "mend it"
            )
            return None

    def _mapping(self, node: Any, path: KeyPath, around: tuple[int, ...]) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:  # before merge keys (<<) are laid in: those may be said again
            key, line = self._key(key_node), key_node.start_mark.line + 1
            if key in seen:
                self._fault((*path, key), key_node, f"the key of line {seen[key]} again", "keep one of the two")
            seen.setdefault(key, line)
        self._loader.flatten_mapping(node)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key_node.tag != "tag:yaml.org,2002:str":
                self._fault((*path, key), key_node, f"the key {key}, which YAML reads as no text", "quote it")
            self._document.lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = self.read(value_node, (*path, key), around)
        return found

    @staticmethod
    def _key(node: Any) -> str:
        return node.value if isinstance(node, yaml.ScalarNode) else f"({node.id})"

    def _fault(self, path: KeyPath, node: Any, found: str, do: str) -> None:
        where = f"{self._name}:{node.start_mark.line + 1}"
        self._document.faults.append(Fault(dotted(path), where, found, do))
