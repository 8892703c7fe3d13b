"""Persistent buffers (batch statistics, counters): each rank has its own; before anyone looks they are made one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from disttrain.strategy import Prepared


def share_buffers(prepared: Prepared) -> None:
    """Give every rank rank 0's persistent buffers, as DistributedDataParallel does by default. Collective.

    An evaluation is then that of the checkpoint, and a run that continues has what the one that went on had.
    """
    for module in (prepared.model, prepared.objective):
        if module is None or dist.get_world_size() == 1:
            continue
        persistent = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in persistent and buffer.numel():
                raw = buffer.detach().contiguous()
                dist.broadcast(raw.reshape(-1).view(torch.uint8), src=0)  # as bytes: gloo knows no bool
                with torch.no_grad():
                    buffer.copy_(raw)
