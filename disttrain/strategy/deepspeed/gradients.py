"""What DeepSpeed's optimizers keep of gradients between backwards and steps, and would use again.

A step's gradient is of that step alone; a parameter that it does not reach has a zero one. Imports no deepspeed.
"""

from __future__ import annotations

from typing import Any


def is_stage_three(zero: Any) -> bool:
    """Whether the optimizer is stage 3's, whose parameters are cut as well."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def forget_step(zero: Any) -> None:
    """After a step: zero what would be added or applied again to a parameter that the next one does not reach. Local.

    Stage 3 keeps the last gradient of every parameter; with offload, all stages keep copies on the host.
    """
    if is_stage_three(zero):
        zero.grad_partitions_flat_buffer.zero_()
        kept = [flat.grad for flat in zero.fp32_partitioned_groups_flat if flat.grad is not None]
    elif zero.cpu_offload:
        kept = [flat.grad for flat in zero.single_partition_of_fp32_groups if flat.grad is not None]
        kept += zero.accumulated_grads_in_cpu.values()
    else:
        return
    for gradient in kept:
        gradient.zero_()


def discard_step(zero: Any) -> None:
    """Instead of a step: drop everything that backwards have brought since the last one. Local."""
    zero.zero_grad()
    if is_stage_three(zero):
        zero.averaged_gradients = {}
        zero._offload_boundary_param_ids = set()
    else:
        zero.micro_step_id = -1  # DeepSpeed's INITIAL_MICRO_STEP_ID
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        zero.reset_cpu_buffers()
        zero._offload_accumulated_param_ids = set()
    forget_step(zero)
