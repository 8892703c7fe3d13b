"""Converts checkpoints from one format to another, with what only the model knows: its config and tied names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from disttrain.checkpoint import Location, parse_location
from disttrain.checkpoint.formats import (
    EXPORTS,
    ConversionResult,
    Extras,
    NativeWeights,
    export_weights,
    import_checkpoint,
)
from disttrain.engine.checkpointing.locate import kind_of, open_any
from disttrain.engine.checkpointing.restoring import other_names
from disttrain.engine.loading import configured_model
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.logs import package_logger
from disttrain.model import build_model
from disttrain.runtime.seeds import restored_generators

TARGETS = (*EXPORTS, "disttrain")

_log = package_logger("checkpoint")


def convert(
    source: str | Location, target: str | Path, *, to: str | None = None, name: str = "model", build: bool = True
) -> ConversionResult:
    """Convert the checkpoint or weights at `source` to another format at `target`. Local. Never overwrites.

    Args:
        source: a run, a checkpoint, or weights in any supported format.
        target: the file or folder to write.
        to: one of TARGETS. Default: the format that fits the names of source and target.
        name: the prepared model whose weights are exported, or the name for imported weights.
        build: whether to build the model from the checkpoint's config, for its Hugging Face config and tied names.
            This runs the code that the config names.

    Raises:
        CheckpointError: the source cannot be read or converted, or the target exists.
        ConfigError: `to` is unknown.
    """
    source, target = parse_location(source), Path(target)
    found = kind_of(source)
    to = to or _likely(found, target)
    if to not in TARGETS:
        known = ", ".join(TARGETS)
        raise ConfigError(explain(f"Cannot convert {source} to {to!r}.", "unknown format", f"use one of {known}"))
    if to == "disttrain":
        if found == "disttrain":
            do = f"convert it to one of {', '.join(EXPORTS)}, or copy the folder"
            raise CheckpointError(explain(f"Cannot convert {source} to a disttrain checkpoint.", "it is one", do))
        assert isinstance(source, Path), "an address holds a disttrain checkpoint"
        return import_checkpoint(source, target, owner=name)
    weights = open_any(source, name)
    if not isinstance(weights, NativeWeights):
        return export_weights(weights, target, to)
    model = _model_of(weights) if build and to != "safetensors" else None
    extras = Extras(_texts(model), other_names(model)) if model is not None else Extras()
    done = export_weights(weights, target, to, extras=extras)
    base = [key for key in weights.checkpoint.document.get("base", ()) if key.startswith(f"model/{name}/")]
    left_out = [f"{len(base)} frozen parameters, which checkpoint.only=trainable left out"] if base else []
    if to == "huggingface" and not extras.texts:
        why = "the model has no Hugging Face config, or could not be built" if build else "no model was built"
        left_out.append(f"config.json: {why}")
    return ConversionResult(done.path, done.tensors, tuple(left_out))


def _likely(found: str, target: Path) -> str:
    endings = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch"}
    return endings.get(target.suffix, "huggingface" if found == "disttrain" else "disttrain")


def _model_of(weights: NativeWeights) -> nn.Module | None:
    """Build the model from its config, on the meta device if possible. Returns None where it cannot be built."""
    causes = []
    for meta in (True, False):
        with restored_generators():
            try:
                return build_model(configured_model(weights.checkpoint), seed=0, meta=meta)
            except Exception as error:  # noqa: BLE001 - user code; weights can be exported without the model
                causes.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    _log.warning(
        "%s: the model cannot be built here, so its weights are exported without config.json and the further names of "
        "tied weights (%s)",
        weights.path,
        causes[-1],
    )
    return None


def _texts(model: nn.Module | None) -> dict[str, str]:
    """Return `config.json`, and `generation_config.json` if there is one, of a Hugging Face model."""
    found = {}
    for attribute, file in (("config", "config.json"), ("generation_config", "generation_config.json")):
        config: Any = getattr(model, attribute, None)
        if callable(getattr(config, "to_json_string", None)):
            values = json.loads(config.to_json_string())
            if attribute == "config" and not values.get("architectures"):
                values["architectures"] = [type(model).__name__]
            found[file] = json.dumps(values, indent=2) + "\n"
    return found
