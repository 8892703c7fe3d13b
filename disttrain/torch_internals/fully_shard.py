"""Reads and completes what FSDP2 records about its parameters. There is no public alternative.

`missing_for_fsdp` says what this torch lacks, so that strategy `fsdp` is rejected before a process group exists.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from disttrain.torch_internals.access import check, private, reader
from disttrain.torch_internals.tensors import version_reader

_GATHERED = "_unsharded_param"


@cache
def missing_for_fsdp() -> str | None:
    """Return the first internal of FSDP2 that this torch lacks, or None. Local; needs no process group."""
    package = "torch.distributed.fsdp._fully_shard"
    name = "FSDPModule._get_fsdp_state"
    try:
        private(FSDPModule, "_get_fsdp_state")
        name = "FSDPState._fsdp_param_group"
        check(private(private(f"{package}._fsdp_state", "FSDPState")(), "_fsdp_param_group") is None, name)
        name = "FSDPParam"
        annotations = private(f"{package}._fsdp_param", "FSDPParam").__annotations__
        for name in ("sharded_param", "unsharded_accumulated_grad", "reduce_dtype", "_unsharded_param"):
            private(SimpleNamespace(**annotations), name)
    except Exception:  # noqa: BLE001 - a renamed or changed private name may raise anything
        return name
    return None if version_reader() is not None else "Tensor._version"


class ShardedGroup:
    """The parameters that FSDP2 gathers together, as torch records them for one module. Local."""

    def __init__(self, module: FSDPModule) -> None:
        self._fsdp_state = private(module, "_get_fsdp_state")()
        self._group_of = reader("_fsdp_param_group")
        self._version = version_reader()

    def sharded(self) -> list[nn.Parameter]:
        """Return this rank's shards, as the module holds them between steps."""
        return [one.sharded_param for one in self._params()]

    def changed(self) -> list[Tensor]:
        """Return the shards of parameters that were written into while they were gathered.

        torch's own writes leave the version of a gathered parameter as it is. A parameter that was gathered in
        inference mode has no version.
        """
        assert self._version is not None, "strategy fsdp was checked"
        gathered = [(one, getattr(one, _GATHERED, None)) for one in self._params()]
        return [
            one.sharded_param
            for one, full in gathered
            if full is not None and not full.is_inference() and self._version(full)
        ]

    def complete_gradients(self) -> None:
        """Give zeros to a parameter without a gradient, where the group holds gradients of earlier micro-batches.

        torch 2.13 adds gradients up in the dtype of reductions. It rejects a group in which another gradient is new, or
        never comes, and so has the dtype of computation.
        """
        params = self._params()
        if all(one.unsharded_accumulated_grad is None for one in params):
            return
        for one in params:
            full = getattr(one, _GATHERED)
            if one.unsharded_accumulated_grad is None and full.requires_grad:
                one.unsharded_accumulated_grad = torch.zeros_like(full, dtype=one.reduce_dtype)

    def _params(self) -> list[Any]:
        group = self._group_of(self._fsdp_state)
        return [] if group is None else group.fsdp_params
