"""Detects the format of a path from its names and first bytes, and opens it with the reader of that format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from disttrain.checkpoint.form.manifest import MANIFEST
from disttrain.checkpoint.formats import deepspeed, huggingface, torch_distributed
from disttrain.checkpoint.formats.foreign_state import ForeignState, ForeignWeights
from disttrain.checkpoint.formats.huggingface import SafetensorsWeights
from disttrain.checkpoint.formats.native import NativeWeights
from disttrain.checkpoint.formats.torch_file import TorchWeights
from disttrain.checkpoint.formats.weights import Weights
from disttrain.checkpoint.read.reader import Checkpoint
from disttrain.checkpoint.storage.location import step_of
from disttrain.errors import CheckpointError, explain

_OPEN: dict[str, Callable[[Path, str], Weights]] = {
    "disttrain": lambda path, owner: NativeWeights(Checkpoint.open(path), owner),
    "huggingface": lambda path, owner: huggingface.open_folder(path),
    "safetensors": lambda path, owner: SafetensorsWeights(path, [path]),
    "torch": lambda path, owner: TorchWeights(path),
    "torch-distributed": lambda path, owner: ForeignWeights(read_state(path, owner), owner),
    "deepspeed": lambda path, owner: ForeignWeights(read_state(path, owner), owner),
}

_STATES: dict[str, Callable[[Path, str], ForeignState]] = {
    "torch-distributed": torch_distributed.read_torch_distributed,
    "deepspeed": deepspeed.read_deepspeed,
}

FORMATS = tuple(_OPEN)


def format_of(path: Path) -> str:
    """Return one of FORMATS. Reads names and first bytes only. Local.

    Raises CheckpointError that describes what the path contains instead.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir())
        # A step folder without a manifest counts as well: the reader of checkpoints explains the problem.
        if MANIFEST in names or step_of(path.name) is not None:
            return "disttrain"
        if torch_distributed.METADATA in names:
            return "torch-distributed"
        if deepspeed.looks_like(names):
            return "deepspeed"
        if huggingface.is_folder(path):
            return "huggingface"
        problem = f"a folder with {', '.join(names[:5])}" if names else "an empty folder"
    elif path.is_file():
        with path.open("rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":  # a JSON header after its length
            return "safetensors"
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            return "torch"
        problem = f"a file that begins with {start[:8]!r}"
    else:
        problem = "no such file or folder"
    fix = (
        "name a run, a checkpoint, a Hugging Face folder, a .safetensors file, a file of torch.save, a torch "
        "distributed checkpoint or a DeepSpeed checkpoint"
    )
    raise CheckpointError(explain(f"Cannot load {path}.", problem, fix))


def open_weights(path: str | Path, owner: str = "model") -> Weights:
    """Open a model's weights at `path` in any format. Local.

    In a disttrain checkpoint, these are the weights of the model prepared as `owner`. Tensors stay on disk until they
    are requested. Raises CheckpointError for anything that cannot be read.
    """
    path = Path(path)
    return _OPEN[format_of(path)](path, owner)


def read_state(path: Path, owner: str) -> ForeignState:
    """Read a training state that another library wrote, under the names of `owner`. Local.

    Raises CheckpointError.
    """
    return _STATES[format_of(path)](path, owner)


def carries_state(path: Path) -> bool:
    """Return whether `read_state` reads the path: weights with optimizer state instead of weights alone. Local."""
    return format_of(path) in _STATES
