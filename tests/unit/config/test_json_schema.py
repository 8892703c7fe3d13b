"""The JSON Schema for editors is current, valid for every config in the project, and as strict as `check`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from disttrain.config.json_schema import SCHEMA_FILE, schema_text

PROJECT = Path(__file__).resolve().parents[3]
SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
SPEAKS_ONLY = {"$schema", "$defs", "title", "description", "default"}


def misfits(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Where `value` does not fit.

    Knows the keywords of draft 2020-12 that this schema uses, and raises for any other.
    """
    for word, said in schema.items():
        if word == "$ref":
            yield from misfits(value, SCHEMA["$defs"][said.removeprefix("#/$defs/")], path)
        elif word == "anyOf":
            if not any(not list(misfits(value, one, path)) for one in said):
                yield f"{path}: {value!r} fits none of {said}"
        elif word == "type":
            if not isinstance(value, TYPES[said]) or (isinstance(value, bool) and said in ("integer", "number")):
                yield f"{path}: {value!r} is no {said}"
        elif word in ("enum", "const"):
            if value not in (said if word == "enum" else [said]):
                yield f"{path}: {value!r} is none of {said}"
        elif word == "pattern":
            if isinstance(value, str) and not re.search(said, value):
                yield f"{path}: {value!r} does not match {said}"
        elif word in ("minimum", "exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(value, int | float):
                fits = {"minimum": value >= said, "exclusiveMinimum": value > said, "exclusiveMaximum": value < said}
                if not fits[word]:
                    yield f"{path}: {value!r} against {word} {said}"
        elif word == "items":
            for index, item in enumerate(value if isinstance(value, list) else ()):
                yield from misfits(item, said, f"{path}.{index}")
        elif word == "properties":
            for key, inner in said.items():
                if isinstance(value, dict) and key in value:
                    yield from misfits(value[key], inner, f"{path}.{key}")
        elif word == "additionalProperties":
            others = (
                [key for key in value if key not in schema.get("properties", {})] if isinstance(value, dict) else []
            )
            for key in others:
                yield from [f"{path}: the key {key!r}"] if said is False else []
                yield from misfits(value[key], said, f"{path}.{key}") if isinstance(said, dict) else ()
        else:
            assert word in SPEAKS_ONLY, f"this test does not know {word!r}: teach it"


def test_the_file_is_what_the_module_writes(tmp_path: Path) -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run python -m disttrain.config.json_schema"
    shutil.copytree(PROJECT / "disttrain", tmp_path / "disttrain", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "disttrain" / "config" / "schema.json"
    copy.unlink()
    subprocess.run([sys.executable, "-m", "disttrain.config.json_schema"], cwd=tmp_path, check=True, timeout=240)
    assert copy.read_bytes() == SCHEMA_FILE.read_bytes()


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_project_is_valid(path: Path) -> None:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(misfits(value, SCHEMA)) == []


GOOD: dict[str, Any] = {
    "extends": "base.yaml",
    "version": 1,
    "run": {"seed": "${data.global_batch}", "epochs": 3, "timeout_s": 5, "steps": None},
    "model": {"target": "gpt", "args": {"anything": [1, {"target": "a.b:C"}]}, "weights": None},
    "data": {"train": {"target": "a:b"}, "global_batch": {"tokens": 5}, "micro_batch": None, "last": "drop"},
    "eval": {"sets": {"any name": {"target": "a:b"}}},
    "optim": {"target": "torch.optim.SGD", "no_decay": ["*.bias"], "clip_norm": 1},
    "mesh": {"shard": -1},
    "strategy": {"name": "theirs", "theirs": {"x": 1}, "fsdp": {"reshard": False}, "deepspeed": {"stage": 3}},
    "precision": {"compute": "bf16"},
    "report": {"trackers": ["tensorboard", {"target": "a:b", "args": {}}]},
}


def test_every_form_of_a_config_is_valid() -> None:
    assert list(misfits(GOOD, SCHEMA)) == []
    assert list(misfits({}, SCHEMA)) == [], "a file may leave everything to the one it extends"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "stps", 3),
        ("run", "seed", "ten"),
        ("run", "seed", -1),
        ("run", "seed", 2**63),
        ("run", "epochs", 0),
        ("run", "device", "gpu"),
        ("run", "steps", True),
        ("model", "layers", 3),
        ("model", "target", None),
        ("data", "global_batch", {"token": 5}),
        ("data", "shuffle", "sometimes"),
        ("eval", "sets", [{"target": "a:b"}]),
        ("eval", "sets", {"a": "b:c"}),
        ("optim", "no_decay", "*.bias"),
        ("mesh", "pipeline", 2),
        ("strategy", "fsdp", {"reshrd": True}),
        ("strategy", "deepspeed", {"stage": 0}),
        ("precision", "compute", "fp8"),
        ("report", "trackers", [{"args": 3}]),
    ],
)
def test_faults_that_check_rejects_in_one_key_are_marked_by_an_editor_too(section: str, key: str, value: Any) -> None:
    assert list(misfits({**GOOD, section: {**GOOD[section], key: value}}, SCHEMA)), "it fits"


def test_sections_are_those_of_a_config_and_no_others() -> None:
    assert list(misfits({"modle": {}}, SCHEMA)) == [": the key 'modle'"]
    assert list(misfits({"version": 2}, SCHEMA))
    from disttrain.config import Config

    assert set(SCHEMA["properties"]) == {"extends", *Config.model_fields}
