"""State created for loading is on the device where the optimizer would create it, fused or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.optim.named import NamedParameter
from disttrain.strategy.canonical_boxes import replicated_shards
from disttrain.strategy.contract import Prepared

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def created(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.device]:
    """Devices of the state that is created for a checkpoint, for every kind of AdamW and NAdam, by key."""
    named = tuple(NamedParameter(name, one, one.shape) for name, one in model.named_parameters())
    prepared = Prepared("net", model, named=named, optimizer=optimizer)
    shapes: dict[str, Any] = {"step": (), "mu_product": (), "exp_avg": tuple(model.weight.shape)}
    stored = {f"optim/net/weight:{key}": SimpleNamespace(shape=s, dtype=torch.float32) for key, s in shapes.items()}
    shards = {shard.name.rpartition(":")[2]: shard for shard in replicated_shards(prepared, stored, replica=(0, 1))}
    return {key: shards[key].tensor.device for key in shapes}


@pytest.mark.parametrize("setting", ["fused", "capturable", None])
def test_steps_are_on_the_parameters_device_if_a_kernel_reads_them(setting: str | None) -> None:
    model = nn.Linear(3, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    if setting is not None:
        optimizer.param_groups[0][setting] = True
    found = {key: device.type for key, device in created(optimizer, model).items()}
    assert found == {"step": "meta" if setting else "cpu", "mu_product": "meta", "exp_avg": "meta"}


WAYS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adamax, {}),
]
ON_GPUS_ONLY = [(make, {"capturable": True}) for make in (torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax)]


@pytest.mark.parametrize(
    ("make", "settings", "device"),
    [
        *((*way, "cpu") for way in WAYS),
        *(pytest.param(*way, "cuda", marks=ON_GPU) for way in (*WAYS, *ON_GPUS_ONLY)),
    ],
)
def test_an_optimizers_state_is_there_after_torchs_load(make: Any, settings: Any, device: str) -> None:
    model = nn.Linear(3, 2, bias=False, device=device)
    first = make(model.parameters(), **settings)
    model.weight.grad = torch.ones_like(model.weight)
    first.step()
    again = make(model.parameters(), **settings)
    again.load_state_dict(first.state_dict())
    own = {key: value.device for key, value in again.state[model.weight].items()}
    found = created(make(model.parameters(), **settings), model)
    assert {key: found[key] for key in found if key in own} == {key: own[key] for key in found if key in own}
    assert "step" in own
