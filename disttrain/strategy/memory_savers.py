"""Recomputes activations of a model's blocks to save memory, and compiles blocks to make them faster.

Each block's `forward` is replaced in place, before any sharding. No module is wrapped, so the names of parameters do
not change, and a strategy's hooks stay around the block: parameters that it gathers for the backward are there when the
forward runs again. Compilation comes first, so that the compiled forward is recomputed. A model without blocks is
rejected.
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
"""Operations whose results `selective` keeps, by namespace: products, convolutions, attention, and reductions over
ranks within a block. A collective that writes into its argument, as ZeRO-3 gathers parameters, must not be here: when
its result is kept, the second forward leaves the argument unwritten."""


_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Options of torch.compile. With this option dropout equals that of a block that is not compiled."""


def save_memory(model: nn.Module, memory: MemoryConfig) -> None:
    """Apply the config's section `memory` to each block. Local.

    Raises ConfigError where the model has no blocks or lacks one of the names in `memory.blocks`, and LaunchError where
    torch lacks what `memory.recompute=budget` needs.
    """
    if memory.recompute == "none" and not memory.compile:
        return
    blocks = choose_blocks(model, memory.blocks, "memory.blocks")
    if not blocks:
        asked = "memory.compile=true" if memory.recompute == "none" else f"memory.recompute={memory.recompute}"
        raise ConfigError(
            explain(
                f"Cannot use {asked}, which works block by block.",
                f"{type(model).__qualname__} has no repeated blocks",
                "name its large modules by class or by a pattern of module names: memory.blocks=['encoder.*']",
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
        setattr(block, "forward", forward)  # noqa: B010 - of the instance, found before the class's
    _log.info("memory: recompute=%s compile=%s on %d block(s)", memory.recompute, memory.compile, len(blocks))


def _recomputed(forward: Callable[..., Any], selective: bool, /, *args: Any, **kwargs: Any) -> Any:
    """Call the forward. The backward computes its activations again, under the same random state."""
    # `checkpoint` has keywords such as `use_reentrant`, and would take a block's keyword of the same name.
    called = partial(forward, **kwargs)
    if selective:
        kept = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(called, *args, use_reentrant=False, context_fn=kept)
    return checkpoint(called, *args, use_reentrant=False)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.overloadpacket.__name__ in COSTLY.get(operation.namespace, ())
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _compiled(forward: Callable[..., Any], block: nn.Module, memory: MemoryConfig) -> Callable[..., Any]:
    """Compile a forward. A bound method stays bound to its block, so that a deep copy uses the copy's weights."""
    budget = memory.budget if memory.recompute == "budget" else None
    function = getattr(forward, "__func__", None)
    if function is None or getattr(forward, "__self__", None) is not block:
        return _compile_function(forward, budget)
    return MethodType(_compiled_function(function, budget), block)


@cache
def _compiled_function(function: Callable[..., Any], budget: float | None) -> Callable[..., Any]:
    """Compile a function once per process, for all blocks of a class.

    torch finds compiled code by function and backend. With a backend per block it would compile every block again, and
    after eight blocks none.
    """
    return _compile_function(function, budget)


def _compile_function(function: Callable[..., Any], budget: float | None) -> Callable[..., Any]:
    compiled: Callable[..., Any] = (
        torch.compile(function, options=_OPTIONS)
        if budget is None
        else torch.compile(function, backend=partial(_compile, budget))
    )
    return compiled


def _compile(budget: float, graph: Any, inputs: Any) -> Any:
    """Compile a graph under a memory budget."""
    # A budget of exactly 0 keeps only the inputs, and ignores the nodes' own policies.
    return compile_within(max(budget, 1e-9), graph, inputs, _OPTIONS | {"joint_custom_pre_pass": _keep_random})


def _keep_random(graph: torch.fx.Graph) -> None:
    """Keep random numbers instead of drawing them again.

    The second draw would differ, and with dropout the gradient was 10 % wrong (measured with torch 2.13 on a CPU).
    """
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
