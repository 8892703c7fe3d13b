"""From one format of checkpoints to another, with what only the model can tell: its config and tied names."""

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
from disttrain.engine.checkpointing.opening import kind_of, open_any
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
    """Make `target`, one of TARGETS, of what `source` holds; where `to` is left out, what fits the names. Local.

    Of a disttrain checkpoint the weights of the model prepared as `name` go out; what comes in gets that name. `build`
    has the checkpoint's own config make the model, which runs the code that it names, for what only a model can tell.
    Raises CheckpointError, ConfigError for an unknown target; never overwrites.
    """
    source, target = parse_location(source), Path(target)
    found = kind_of(source)
    to = to or _likely(found, target)
    if to not in TARGETS:
        known = ", ".join(TARGETS)
        raise ConfigError(explain(f"{source} is to be converted to {to!r}.", "no such format", f"use one of {known}"))
    if to == "disttrain":
        if found == "disttrain":
            do = f"convert it to one of {', '.join(EXPORTS)}, or copy the folder"
            raise CheckpointError(explain(f"{source} is to become a disttrain checkpoint.", "one already", do))
        assert isinstance(source, Path)  # an address is a disttrain checkpoint's
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
    """The model by its config, without its values where its constructor can do that; None where none can be built."""
    causes = []
    for meta in (True, False):
        with restored_generators():
            try:
                return build_model(configured_model(weights.checkpoint), seed=0, meta=meta)
            except Exception as error:  # noqa: BLE001 - users' code; weights can go out without it
                causes.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    _log.warning(
        "%s: the model cannot be built here, so its weights go out without config.json and the further names of tied "
        "weights (%s)",
        weights.path,
        causes[-1],
    )
    return None


def _texts(model: nn.Module | None) -> dict[str, str]:
    """`config.json`, and `generation_config.json` where there is one, of a Hugging Face model."""
    found = {}
    for attribute, file in (("config", "config.json"), ("generation_config", "generation_config.json")):
        config: Any = getattr(model, attribute, None)
        if callable(getattr(config, "to_json_string", None)):
            values = json.loads(config.to_json_string())
            if attribute == "config" and not values.get("architectures"):
                values["architectures"] = [type(model).__name__]
            found[file] = json.dumps(values, indent=2) + "\n"
    return found
