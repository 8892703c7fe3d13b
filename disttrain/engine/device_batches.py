"""Batches onto the device, whatever their structure, without waiting for the copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from disttrain.data import MicroBatch
from disttrain.torch_internals import map_tensors


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with every tensor on `device`; itself where nothing is to move. Local."""
    if device.type == "cpu":
        return micro
    return replace(micro, batch=move(micro.batch, device))


def move(batch: Any, device: torch.device) -> Any:
    """Every tensor in lists, tuples and mappings. Local."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
