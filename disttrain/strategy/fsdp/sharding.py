"""Shards a model with FSDP2: each block is one group of parameters, and the rest of the model is another.

Gradients are added up over shards and replicas, never averaged. A group of parameters with several dtypes is rejected.
Called by strategy `fsdp`.
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
"""`reduce: auto` keeps full gradients during an accumulation if they need at most a fourth of the free memory."""


def shard_model(model: nn.Module, mesh: DeviceMesh, options: FSDPOptions, world: World) -> list[tuple[str, nn.Module]]:
    """Shard a model in place over `mesh` (shards, or replicas of shards), and return its blocks with their names.

    Local, but collective where `options.reshard` is a number, for which torch creates process groups.
    """
    lay_out_rows(model)
    uncut = {parameter for parameter in model.parameters() if parameter.dim() == 0 or parameter.numel() == 0}
    blocks = choose_blocks(model, options.blocks)
    pinned = world.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if options.offload else OffloadPolicy()
    reduced = DTYPES[world.precision.reduce]
    wide = [module for module in model.modules() if _is_wide(module, world)]
    for module in wide:
        fully_shard(module, mesh=mesh, offload_policy=offload, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduced))
    # Parameters travel, and gradients are computed, in the dtype of matrix products. Forwards run under autocast too,
    # so that operations which autocast keeps in float32 stay there.
    policy = MixedPrecisionPolicy(world.autocast, reduced if _states_reduction(world) else None)
    shard = partial(fully_shard, mesh=mesh, offload_policy=offload, mp_policy=policy)
    for _, block in blocks:
        ignored = uncut & set(block.parameters())
        shard(block, reshard_after_forward=options.reshard, ignored_params=ignored or None)
    root = shard(model, reshard_after_forward=False, ignored_params=uncut or None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Not recursive (torch 2.13). Without it on one module the norm is 5-7 % wrong, which AdamW hides.
            module.set_gradient_divide_factor(1.0)
            # Otherwise the factor becomes a PREMUL_SUM, which gloo does not support.
            module.set_force_sum_reduction_for_comms(True)
    if hasattr(root, "set_reduce_scatter_unused_params"):
        root.set_reduce_scatter_unused_params(True)
    _reject_mixed(model)
    _prefetch([block for _, block in blocks], options)
    _log.info("fsdp: %d block(s) sharded separately, the rest as one group", len(blocks))
    return blocks


def _reject_mixed(model: nn.Module) -> None:
    """Raise ConfigError for a group of parameters with several dtypes, on which torch asserts in the first forward."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameters in Groups(model).sharded():
        kinds: dict[torch.dtype, str] = {}
        for one in parameters:
            if one.requires_grad:
                kinds.setdefault(one.dtype, names[id(one)])
        if len(kinds) > 1:
            found = ", ".join(f"{name} of {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items())
            fix = "use strategy ddp, one dtype, or strategy.fsdp.blocks with a module for the parameters of each dtype"
            raise ConfigError(explain("Cannot shard trained parameters of several dtypes as one group.", found, fix))


def _prefetch(blocks: Sequence[nn.Module], options: FSDPOptions) -> None:
    """Let each block gather the next blocks in the model's order, and the previous ones in the backward."""
    ahead, behind = options.prefetch_forward, options.prefetch_backward
    sharded: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
    for place, block in enumerate(sharded):
        if ahead:
            block.set_modules_to_forward_prefetch(sharded[place + 1 : place + 1 + ahead])
        if behind:
            block.set_modules_to_backward_prefetch(sharded[max(0, place - behind) : place][::-1])


def reduces_every(model: nn.Module, options: FSDPOptions, world: World) -> bool:
    """Whether gradients are reduced at every micro-batch, by `options.reduce`.

    Collective where that is `auto` on a GPU: all ranks decide by the smallest free memory.
    """
    if options.reduce != "auto" or world.device.type != "cuda":
        return options.reduce == "every"
    # A full gradient is as large as its gathered parameter, which stays sharded over tensor ranks.
    trained = sum(
        parameter.numel() // _tensor_parts(parameter) for parameter in model.parameters() if parameter.requires_grad
    )
    full_bytes = trained * DTYPES[world.precision.reduce].itemsize
    fits = full_bytes * _SHARE_OF_FREE <= torch.cuda.mem_get_info(world.device)[0]
    return world.group.minimum(int(fits)) == 0


def _tensor_parts(parameter: Tensor) -> int:
    """Return the number of parts of a parameter on the `tensor` axis."""
    if not isinstance(parameter, DTensor):
        return 1
    axes = parameter.device_mesh.mesh_dim_names or ()
    return parameter.device_mesh["tensor"].size() if "tensor" in axes and parameter.placements[-1].is_shard() else 1


class Groups:
    """The groups of a sharded model. torch's calls would visit all modules, in 0.1 ms each for a model of 240."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._groups = [ShardedGroup(module) for module in self._modules]
        self._last_settings: tuple[bool, bool] | None = None
        self._holding = False

    def sharded(self) -> Iterator[list[nn.Parameter]]:
        """Yield each group's parameters, as this rank's shards. Local."""
        for group in self._groups:
            yield group.sharded()

    def changed(self) -> list[Tensor]:
        """Return parameters that user code changed while they were gathered. The next gather would lose that. Local."""
        return [parameter for group in self._groups for parameter in group.changed()]

    def communicate(self, *, reduce: bool, last: bool) -> None:
        """Set whether the next backward reduces over shards, and over replicas as the step's `last` does. Local."""
        if (reduce, last) != self._last_settings:
            for module in self._modules:
                module.set_requires_gradient_sync(reduce, recurse=False)
                module.set_requires_all_reduce(last, recurse=False)
                module.set_is_last_backward(reduce)
            self._last_settings = reduce, last
        if reduce and self._holding:
            for group in self._groups:
                group.complete_gradients()
        self._holding = not reduce

    def free_gathered(self) -> None:
        """Free gathered parameters, which a forward without a backward leaves. The next one gathers again. Local."""
        for module in self._modules:
            module.reshard()


def gather_once(model: nn.Module, world: World) -> None:
    """Gather and free once each group whose policy states the dtype of reductions. Collective.

    torch 2.13 reads the gathered parameters of such a group at the end of a backward without a reduction. They do not
    exist for a block that no forward has called yet.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and (_states_reduction(world) or _is_wide(module, world)):
            module.unshard()
            module.reshard()


def _states_reduction(world: World) -> bool:
    """Whether a group's policy states the dtype of reductions, because gradients have another dtype.

    Where both are equal and the policy states it, torch 2.13 accumulates gradients in a copy.
    """
    return DTYPES[world.precision.reduce] != (world.autocast or world.dtype)


def _is_wide(module: nn.Module, world: World) -> bool:
    """Whether a module is a separate group in the master dtype.

    Under autocast the kernels of batch norms need parameters in the dtype of the running statistics.
    """
    return (
        world.autocast is not None
        and isinstance(module, batch_norm_classes())
        and any(True for _ in module.parameters())
    )
