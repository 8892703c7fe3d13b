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
from disttrain.errors import ConfigError, LaunchError, explain
from disttrain.logs import package_logger
from disttrain.strategy.blocks import choose_blocks
from disttrain.torch_internals.compiling import compile_within, missing_for_budget

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


_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""torch.compile's: torch draws random numbers, so that dropout is equal to that of a block that is not compiled."""


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
    if memory.recompute == "budget" and (missing := missing_for_budget()) is not None:
        raise LaunchError(
            explain(
                "Cannot use memory.recompute=budget.",
                f"torch {torch.__version__} has no usable {missing}",
                "install torch 2.11 to 2.14, or set memory.recompute to selective or full",
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
        return _compiled_anew(forward, budget)
    return MethodType(_compiled_function(function, budget), block)


@cache
def _compiled_function(function: Callable[..., Any], budget: float | None) -> Callable[..., Any]:
    """Once a process: what torch compiled it finds again by function and backend, for all blocks of a class. With a
    backend for each block every block would be compiled again, and after eight none any more."""
    return _compiled_anew(function, budget)


def _compiled_anew(function: Callable[..., Any], budget: float | None) -> Callable[..., Any]:
    compiled: Callable[..., Any] = (
        torch.compile(function, options=_OPTIONS)
        if budget is None
        else torch.compile(function, backend=partial(_compile, budget))
    )
    return compiled


def _compile(budget: float, graph: Any, inputs: Any) -> Any:
    """torch.compile's backend under a budget, which is a setting of the process and holds for this graph alone."""
    # A budget of exactly 0 keeps the inputs alone, whatever a node says of itself.
    return compile_within(max(budget, 1e-9), graph, inputs, _OPTIONS | {"joint_custom_pre_pass": _keep_random})


def _keep_random(graph: torch.fx.Graph) -> None:
    """Random numbers are kept, never drawn again: the second draw would be another, and the gradient wrong (torch 2.13
    on a CPU, tried: 10 % off with dropout)."""
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
