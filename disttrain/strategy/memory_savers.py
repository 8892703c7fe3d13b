"""Less memory for more computing, and faster blocks: each block's `forward` is replaced in place, before any sharding.

No module is wrapped, so names of parameters and state dict stay, and a strategy's own hooks on the block stay around
it: what it gathers for the backward is there when the forward runs again.
Order: the compiled forward is what is recomputed. Refuses a model without blocks, which has nothing to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from disttrain.config.schema import MemoryConfig
from disttrain.errors import ConfigError, explain
from disttrain.logs import package_logger
from disttrain.strategy.blocks import choose_blocks

_log = package_logger("strategy")

COSTLY = {
    "aten": {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    },
    "_c10d_functional": {"reduce_scatter_tensor", "all_reduce", "all_to_all_single"},
}
"""Operations whose results `selective` keeps, by namespace: products, convolutions, attention, and what is added up
over ranks within a block. Never a collective that writes into its argument (ZeRO-3 gathers parameters so): a kept
result would leave the argument unwritten the second time."""


def save_memory(model: nn.Module, memory: MemoryConfig) -> None:
    """Let each block recompute and compile as the config's section says. Local.

    Raises ConfigError where it asks for something and the model has no blocks, or none of the names in `memory.blocks`.
    """
    if memory.recompute == "none" and not memory.compile:
        return
    blocks = choose_blocks(model, memory.blocks, "memory.blocks")
    if not blocks:
        asked = "memory.compile=true" if memory.recompute == "none" else f"memory.recompute={memory.recompute}"
        raise ConfigError(
            explain(
                f"{asked} works block by block.",
                f"{type(model).__qualname__}, without repeated blocks",
                "name its large parts, by class or by a pattern of module names: memory.blocks=['encoder.*']",
            )
        )
    for _, block in blocks:
        forward: Callable[..., Any] = block.forward
        if memory.compile:
            forward = _compiled(forward, block, memory)
        if memory.recompute in ("full", "selective"):
            forward = partial(_recomputed, forward, memory.recompute == "selective")
        setattr(block, "forward", forward)  # noqa: B010 - an instance's own, before the class's
    _log.info("memory: recompute=%s compile=%s on %d block(s)", memory.recompute, memory.compile, len(blocks))


def _recomputed(forward: Callable[..., Any], selective: bool, /, *args: Any, **kwargs: Any) -> Any:
    """The forward's results; its activations come again when the backward wants them, under the same random state."""
    # `use_reentrant` and its like are `checkpoint`'s own: a block's keyword of such a name would be taken for them.
    called = partial(forward, **kwargs)
    if selective:
        kept = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(called, *args, use_reentrant=False, context_fn=kept)
    return checkpoint(called, *args, use_reentrant=False)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.overloadpacket.__name__ in COSTLY.get(operation.namespace, ())
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _compiled(forward: Callable[..., Any], block: nn.Module, memory: MemoryConfig) -> Callable[..., Any]:
    """Bound to the block where it was, so that a deep copy of the model computes with the copy's weights."""
    budget = memory.budget if memory.recompute == "budget" else None
    function = getattr(forward, "__func__", None)
    if function is None or getattr(forward, "__self__", None) is not block:
        compiled: Callable[..., Any] = torch.compile(forward, backend=partial(_compile, budget))
        return compiled
    return MethodType(_compiled_function(function, budget), block)


@cache
def _compiled_function(function: Callable[..., Any], budget: float | None) -> Callable[..., Any]:
    """Once a process: what torch compiled it finds again by function and backend, for all blocks of a class. With a
    backend for each block every block would be compiled again, and after eight none any more."""
    compiled: Callable[..., Any] = torch.compile(function, backend=partial(_compile, budget))
    return compiled


def _compile(budget: float | None, graph: Any, inputs: Any) -> Any:
    """torch.compile's own backend, with its drawing of random numbers left to torch, so that dropout is that of a block
    not compiled; the budget, a setting of the whole process, holds for this graph alone."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"fallback_random": True}
    if budget is None:
        return compile_fx(graph, inputs, config_patches=patches)
    # A budget of exactly 0 keeps the inputs alone, whatever a node says of itself.
    with config.patch({"activation_memory_budget": max(budget, 1e-9)}):
        return compile_fx(graph, inputs, config_patches=patches | {"joint_custom_pre_pass": _keep_random})


def _keep_random(graph: torch.fx.Graph) -> None:
    """Random numbers are kept, never drawn again: the second draw would be another, and the gradient wrong (torch 2.13
    on a CPU, tried: 10 % off with dropout)."""
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
