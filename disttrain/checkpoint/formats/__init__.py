"""Reads and writes weights and training states in the formats of other libraries, without running code in the files.

Each format has one module, and `detect` decides which format a path has. Exports contain weights only: a Hugging Face
folder, a safetensors file, or a file of torch.save. Imports are those formats and the checkpoints of
torch.distributed.checkpoint and DeepSpeed. Pickles are read by restricted loaders, each with an explicit list of
classes. The engine and the command line use this package.
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
