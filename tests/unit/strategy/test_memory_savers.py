"""The bytes that a block keeps for its backward, counted at the end of the forward, against closed forms."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.config.schema import MemoryConfig
from disttrain.errors import ConfigError, LaunchError
from disttrain.runtime import Device, check_device
from disttrain.strategy.memory_savers import save_memory

BATCH, WIDTH, HIDDEN = 64, 32, 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return x + gain * self.dropout(self.down(torch.sin(self.up(x))))


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gain=0.5)
        return x


def build(layers: int, **memory: Any) -> Stack:
    torch.manual_seed(1)
    model = Stack(layers)
    save_memory(model, MemoryConfig(**memory))
    return model


def storages() -> dict[int, int]:
    """Address and bytes of the storage of every tensor in this process that Python can see."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}


def kept_bytes(model: nn.Module) -> int:
    """Bytes that a forward allocated and that exist at its end.

    Python also sees tensors that only autograd holds, because they pass through a hook.
    """
    x = torch.ones(BATCH, WIDTH)
    before = storages()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach):
        y = model(x)
    after = storages()
    assert y.requires_grad  # alive until here, with everything that its backward holds
    return sum(size for address, size in after.items() if address not in before)


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Hides existing objects, about three hundred thousand of imported modules, from the counts of a test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
def test_each_block_keeps_what_the_setting_says() -> None:
    activation, hidden, random_state = 4 * BATCH * WIDTH, 4 * BATCH * HIDDEN, torch.get_rng_state().numel()
    grows = {
        recompute: kept_bytes(build(5, recompute=recompute)) - kept_bytes(build(4, recompute=recompute))
        for recompute in ("none", "full", "selective")
    }
    # The block's output, which is the input of the next, and the state of the random number generator.
    assert grows["full"] == activation + random_state
    # In addition the results of both products, and the block's gain as a float64 number.
    assert grows["selective"] == grows["full"] + hidden + activation + 8
    # sin's input and result, dropout's factor (a mask, as wide as its input where torch keeps one), and the output.
    assert grows["none"] >= 2 * hidden + 2 * activation


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputing_changes_no_bit_and_no_name(recompute: str) -> None:
    found = []
    for model in (build(3), build(3, recompute=recompute)):
        torch.manual_seed(2)
        y = model(torch.ones(BATCH, WIDTH, requires_grad=True))
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in model.parameters())])
        assert list(model.state_dict()) == list(Stack(3).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_a_budget_keeps_less_and_draws_each_number_once() -> None:
    found = []
    for memory in ({}, {"compile": True}, {"compile": True, "recompute": "budget", "budget": 0.0}):
        model = build(3, **memory)
        kept_bytes(model)  # compiles
        torch.manual_seed(2)
        model(torch.ones(BATCH, WIDTH)).square().sum().backward()
        found.append((kept_bytes(model), [parameter.grad for parameter in model.parameters()]))
    assert found[2][0] < found[1][0] < found[0][0]
    for _, gradients in found[1:]:
        for gradient, plain in zip(gradients, found[0][1], strict=True):
            # float32's rounding in fused kernels. With another dropout in the backward it was 0.1.
            torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("memory", [{"recompute": "full"}, {"compile": True}])
def test_a_deep_copy_computes_with_its_own_weights(memory: dict[str, Any]) -> None:
    model = build(2, **memory)
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        assert block.forward is not model.blocks[0].forward
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        if "compile" in memory:  # what it is bound to, because a compilation would take seconds
            assert all(block.forward.__self__ is block for block in twin.blocks)
        else:
            assert torch.equal(twin(torch.ones(1, WIDTH)), torch.ones(1, WIDTH))


def test_a_model_without_blocks_keeps_its_memory() -> None:
    for memory, asked in (({"recompute": "full"}, "memory.recompute=full"), ({"compile": True}, "memory.compile=true")):
        with pytest.raises(ConfigError, match=asked):
            save_memory(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), MemoryConfig(**memory))
    with pytest.raises(ConfigError, match=r"memory\.blocks names\.\n.*'Blok'"):
        build(2, recompute="full", blocks=("Blok",))


def test_blocks_can_be_named() -> None:
    model = build(4, recompute="full", blocks=("blocks.2", "blocks.3"))
    assert ["forward" in vars(block) for block in model.blocks] == [False, False, True, True]


def test_no_compiler_starts_before_a_process_group_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device(torch.device("cpu"), "gloo", 1)
    check_device(cpu, compute="fp32", compiles=False)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(LaunchError, match=r"no C\+\+ compiler"):
        check_device(cpu, compute="fp32", compiles=True)
