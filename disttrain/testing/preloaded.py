"""Imports what ranks need. The server that forks the ranks of a test imports this module first."""

from __future__ import annotations

import contextlib
import importlib

from disttrain.runtime.imports import fast_imports

with fast_imports(keep=True):
    import torch.distributed.fsdp

    importlib.import_module("disttrain.engine.loop")
    # With CUDA, DeepSpeed would create a context here, which forked processes cannot use. Without CUDA, the first ZeRO
    # optimizer of each rank would import this module, which takes three seconds because it compiles functions.
    if not torch.cuda.device_count():
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
