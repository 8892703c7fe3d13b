"""How FSDP2 cuts a model: its blocks each as a group, the rest as one, and what travels when, and where parts live.

Gradients are added up, never averaged, over shards and replicas. Refuses groups of several types of parameters.
Enters: strategy fsdp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from disttrain.config.strategy_options import FSDPOptions
from disttrain.errors import ConfigError, explain
from disttrain.logs import package_logger
from disttrain.strategy.blocks import choose_blocks
from disttrain.strategy.construction import lay_out_rows
from disttrain.strategy.contract import DTYPES, World
from disttrain.torch_internals.fully_shard import ShardedGroup
from disttrain.torch_internals.modules import batch_norm_classes

_log = package_logger("strategy")

_SHARE_OF_FREE = 4
"""`reduce: auto` keeps whole gradients through an accumulation while they take at most a fourth of the free memory."""


def shard_model(model: nn.Module, mesh: DeviceMesh, options: FSDPOptions, world: World) -> list[tuple[str, nn.Module]]:
    """Shard in place over `mesh` (shards, or replicas of shards); returns the blocks that became groups of their own.
    Collective where `options.reshard` is a number: torch makes groups for it."""
    lay_out_rows(model)
    uncut = {parameter for parameter in model.parameters() if parameter.dim() == 0 or parameter.numel() == 0}
    blocks = choose_blocks(model, options.blocks)
    pinned = world.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if options.offload else OffloadPolicy()
    reduced = DTYPES[world.precision.reduce]
    wide = [module for module in model.modules() if _is_wide(module, world)]
    for module in wide:
        fully_shard(module, mesh=mesh, offload_policy=offload, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduced))
    # Parameters travel, and gradients are computed, in the type of matrix products. Forwards run under autocast all the
    # same, so that what it keeps wide stays wide.
    policy = MixedPrecisionPolicy(world.autocast, reduced if _states_reduction(world) else None)
    shard = partial(fully_shard, mesh=mesh, offload_policy=offload, mp_policy=policy)
    for _, block in blocks:
        ignored = uncut & set(block.parameters())
        shard(block, reshard_after_forward=options.reshard, ignored_params=ignored or None)
    root = shard(model, reshard_after_forward=False, ignored_params=uncut or None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Not recursive (torch 2.13): missed on one module, the norm is 5-7 % wrong and AdamW hides it.
            module.set_gradient_divide_factor(1.0)
            # Else the factor becomes a PREMUL_SUM, which gloo does not know.
            module.set_force_sum_reduction_for_comms(True)
    if hasattr(root, "set_reduce_scatter_unused_params"):
        root.set_reduce_scatter_unused_params(True)
    _reject_mixed(model)
    _prefetch([block for _, block in blocks], options)
    _log.info("fsdp: %d block(s) sharded each on its own, the rest as one group", len(blocks))
    return blocks


def _reject_mixed(model: nn.Module) -> None:
    """Raise ConfigError for a group that would travel in several types, which torch asserts in the first forward."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameters in Groups(model).sharded():
        kinds: dict[torch.dtype, str] = {}
        for one in parameters:
            if one.requires_grad:
                kinds.setdefault(one.dtype, names[id(one)])
        if len(kinds) > 1:
            found = ", ".join(f"{name} of {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items())
            do = "use strategy ddp, give them one type, or name in strategy.fsdp.blocks a module for those of the other"
            raise ConfigError(explain("fsdp gathers the trained parameters of a group as one type.", found, do))


def _prefetch(blocks: Sequence[nn.Module], options: FSDPOptions) -> None:
    """Each block has those gathered that come next, in the model's order, and in the backward those before."""
    ahead, behind = options.prefetch_forward, options.prefetch_backward
    sharded: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
    for place, block in enumerate(sharded):
        if ahead:
            block.set_modules_to_forward_prefetch(sharded[place + 1 : place + 1 + ahead])
        if behind:
            block.set_modules_to_backward_prefetch(sharded[max(0, place - behind) : place][::-1])


def reduces_every(model: nn.Module, options: FSDPOptions, world: World) -> bool:
    """Whether gradients are reduced at every micro-batch: `reduce`, decided. Collective where it is `auto` on a GPU, so
    that all ranks decide alike."""
    if options.reduce != "auto" or world.device.type != "cuda":
        return options.reduce == "every"
    # A whole gradient is as large as its parameter gathered: over tensor ranks it stays cut.
    trained = sum(
        parameter.numel() // _tensor_parts(parameter) for parameter in model.parameters() if parameter.requires_grad
    )
    whole_bytes = trained * DTYPES[world.precision.reduce].itemsize
    fits = whole_bytes * _SHARE_OF_FREE <= torch.cuda.mem_get_info(world.device)[0]
    return world.group.minimum(int(fits)) == 0


def _tensor_parts(parameter: Tensor) -> int:
    """How many parts the `tensor` axis cuts a parameter into."""
    if not isinstance(parameter, DTensor):
        return 1
    axes = parameter.device_mesh.mesh_dim_names or ()
    return parameter.device_mesh["tensor"].size() if "tensor" in axes and parameter.placements[-1].is_shard() else 1


class Groups:
    """The groups of a sharded model, found once: torch's own calls walk all modules, 0.1 ms each on a model of 240."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._groups = [ShardedGroup(module) for module in self._modules]
        self._said: tuple[bool, bool] | None = None
        self._holding = False

    def sharded(self) -> Iterator[list[nn.Parameter]]:
        """Each group's parameters, as this rank's shards."""
        for group in self._groups:
            yield group.sharded()

    def changed(self) -> list[Tensor]:
        """Parameters that were changed while they were gathered, which the next gather knows nothing of. Local."""
        return [parameter for group in self._groups for parameter in group.changed()]

    def communicate(self, *, reduce: bool, last: bool) -> None:
        """Whether the next backward reduces over shards, and over replicas as the step's `last` does. Local."""
        if (reduce, last) != self._said:
            for module in self._modules:
                module.set_requires_gradient_sync(reduce, recurse=False)
                module.set_requires_all_reduce(last, recurse=False)
                module.set_is_last_backward(reduce)
            self._said = reduce, last
        if reduce and self._holding:
            for group in self._groups:
                group.complete_gradients()
        self._holding = not reduce

    def free_whole(self) -> None:
        """Let go of gathered parameters that a forward without a backward left; the next one gathers anew. Local."""
        for module in self._modules:
            module.reshard()


def introduce(model: nn.Module, world: World) -> None:
    """Gather and free each group once whose gradients are added up in a type that is stated. Collective.

    A block that no forward has called yet has no whole parameter, which torch 2.13 asks for then at the end of a
    backward without a reduction.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and (_states_reduction(world) or _is_wide(module, world)):
            module.unshard()
            module.reshard()


def _states_reduction(world: World) -> bool:
    """Whether a group's policy states the type of reductions: where gradients have another type. Where they have the
    same, stated, torch 2.13 would accumulate them in a copy."""
    return DTYPES[world.precision.reduce] != (world.autocast or world.dtype)


def _is_wide(module: nn.Module, world: World) -> bool:
    """Whether a module is a group of its own in the master type: under autocast the kernels of batch norms want
    parameters as wide as the running statistics."""
    return (
        world.autocast is not None
        and isinstance(module, batch_norm_classes())
        and any(True for _ in module.parameters())
    )
