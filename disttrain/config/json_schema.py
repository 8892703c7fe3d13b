"""Writes the JSON Schema of a config file, for editors, to `schema.json` in this folder.

Run `python -m disttrain.config.json_schema` to write it again. The schema checks single keys. Only `disttrain check`
checks rules over several keys and the options of installed plug-ins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from disttrain.config.schema import Config
from disttrain.config.targets.short_names import NAMES

SCHEMA_FILE = Path(__file__).with_name("schema.json")

_REFERENCE = {"type": "string", "pattern": r"^\$\{[^{}]+\}$"}


def build_schema() -> dict[str, Any]:
    """The schema as a JSON value. Pure."""
    schema = Config.model_json_schema()
    definitions: dict[str, Any] = schema.pop("$defs")
    for one in definitions.values():
        one["properties"] = {name: _or_reference(value) for name, value in one["properties"].items()}
        _loosen(one)
    for name in ("ModelConfig", "OptimConfig", "MatchedOptimConfig", "Target"):
        definitions[name]["properties"]["target"]["description"] = _names_text(name)
    trackers = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Target"}]}
    definitions["ReportConfig"]["properties"]["trackers"] = {"type": "array", "items": trackers}
    extends = {"type": "string", "description": "Another config whose values this file overrides, relative to it."}
    _loosen(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "disttrain config, version 1",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **schema["properties"]},
        "$defs": definitions,
    }


def _or_reference(value: dict[str, Any]) -> dict[str, Any]:
    """Let a property also accept `${section.key}`, unless it accepts any string already. Pure."""
    kinds = [value, *value.get("anyOf", ())]
    if any(one.get("type") == "string" and "enum" not in one for one in kinds):
        return value
    about: dict[str, Any] = {key: value[key] for key in ("default", "description") if key in value}
    bare = {key: item for key, item in value.items() if key not in (*about, "title")}
    alternatives = bare["anyOf"] if set(bare) == {"anyOf"} else [bare]
    return {**about, "anyOf": [*alternatives, _REFERENCE]}


def _loosen(definition: dict[str, Any]) -> None:
    """Require no key, because a file may extend another that has it, and drop titles, which only repeat the key."""
    definition.pop("required", None)
    definition.pop("title", None)
    for value in definition["properties"].values():
        value.pop("title", None)


def _names_text(definition: str) -> str:
    section = {"ModelConfig": "model", "OptimConfig": "optim", "MatchedOptimConfig": "optim"}.get(definition)
    names = [name for one, known in NAMES.items() if section in (None, one) for name in known]
    listed = f"A short name ({', '.join(names)}), or " if names else ""
    return f"{listed}an import path: package.module:attribute or package.module.attribute."


def schema_text() -> str:
    """The content of `schema.json`. Pure."""
    return json.dumps(build_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
