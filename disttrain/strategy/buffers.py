"""Makes persistent buffers (batch statistics, counters) equal on all ranks before they are evaluated or saved."""

from __future__ import annotations

import torch
import torch.distributed as dist

from disttrain.strategy import Prepared


def share_buffers(prepared: Prepared) -> None:
    """Copy rank 0's persistent buffers to all ranks, as DistributedDataParallel does by default. Collective.

    An evaluation then uses the buffers of the checkpoint, and a resumed run has the same buffers as one without a stop.
    """
    for module in (prepared.model, prepared.objective):
        if module is None or dist.get_world_size() == 1:
            continue
        persistent = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in persistent and buffer.numel():
                raw = buffer.detach().contiguous()
                dist.broadcast(raw.reshape(-1).view(torch.uint8), src=0)  # as bytes, since gloo has no bool
                with torch.no_grad():
                    buffer.copy_(raw)
