"""Trains PyTorch models on one device or many: switch the strategy or the cluster size, and the results stay the same.

The public names are loaded on first use, so that `import disttrain` and `disttrain --help` import no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from disttrain.runtime.imports import fast_imports

if TYPE_CHECKING:
    from disttrain.config import Config as Config
    from disttrain.engine import Engine as Engine
    from disttrain.engine import load as load
    from disttrain.engine import train as train

__version__ = "0.1.0"
__all__ = ["Config", "Engine", "__version__", "load", "train"]

_PACKAGES = {
    "Config": "disttrain.config",
    "Engine": "disttrain.engine",
    "load": "disttrain.engine",
    "train": "disttrain.engine",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        with fast_imports():
            return getattr(import_module(_PACKAGES[name]), name)
    raise AttributeError(f"module 'disttrain' has no attribute {name!r}; it has {', '.join(__all__)}")
