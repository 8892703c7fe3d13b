"""Formats at the border: weights and training states of others, read and written without running anything in them.

One file a format, `registry` says which one a path is in. Exports are weights only: a Hugging Face folder, one
safetensors file, one file of torch.save. Imports are those, torch's distributed checkpoints and DeepSpeed's. Pickles
are read by restricted loaders with an explicit list of classes each. Entered by the engine and the command line.
"""

from __future__ import annotations

from disttrain.checkpoint.formats.convert import EXPORTS, ConversionResult, Extras, export_weights, import_checkpoint
from disttrain.checkpoint.formats.detect import FORMATS, format_of, open_weights
from disttrain.checkpoint.formats.native import NativeWeights
from disttrain.checkpoint.formats.weights import (
    Rename,
    WantedBox,
    WeightInfo,
    Weights,
    match_weights,
    read_weight,
)

__all__ = [
    "EXPORTS",
    "FORMATS",
    "ConversionResult",
    "Extras",
    "NativeWeights",
    "Rename",
    "WantedBox",
    "WeightInfo",
    "Weights",
    "export_weights",
    "format_of",
    "import_checkpoint",
    "match_weights",
    "open_weights",
    "read_weight",
]
