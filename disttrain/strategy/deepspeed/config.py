"""DeepSpeed's own config, made from ours: what decides arithmetic or memory is stated, nothing is left to its defaults.

In three layers: what we would choose, the user's native JSON over it, and what is ours alone over both (a native value
that contradicts it was refused with the config). Pure; imports no deepspeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disttrain.config.schema import PrecisionConfig

BUCKET_MB = 25.0
"""Where `bucket_mb` is left out, as DDP's. DeepSpeed's own buckets take 2 GiB a rank each."""

PERSISTENT = 10_000
"""Stage 3 keeps parameters of at most so many elements whole on every rank: norms and biases, whose gathers would cost
more time than they save memory. DeepSpeed's 100,000 would keep all of a small model."""

REPLACED = ("train_batch_size", "optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast")
"""Sections of a native JSON that were compared with our config, which says them in its own way."""


def engine_config(options: Any, precision: PrecisionConfig, device: str) -> dict[str, Any]:
    """What `deepspeed.initialize` is given on a device of type `device`."""
    native = {key: value for key, value in (options.native or {}).items() if key not in REPLACED}
    return _over(_over(_chosen(options.stage, device), _said(native)), _owned(options, precision))


def bound_gathered(config: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """Stage 3's config for a model whose largest module has `largest` elements: while that one computes, a bucket more
    may be on its way. DeepSpeed gathers up to a bucket ahead at every module, up to 1e9 elements in all: most models
    whole."""
    zero = config["zero_optimization"]
    live = largest + int(zero["stage3_prefetch_bucket_size"])
    return {**config, "zero_optimization": {"stage3_max_live_parameters": live, **zero}}


def _chosen(stage: int, device: str) -> dict[str, Any]:
    """What a native JSON may change. DeepSpeed counts elements, of 4 bytes here, and wants an even number of them."""
    zero = {
        **_buckets(stage, BUCKET_MB),
        # Stage 3 copies a bucket's gradients together as it reduces them: a place for them before that is no use.
        "contiguous_gradients": stage < 3,
        "overlap_comm": stage == 3,
        "reduce_scatter": True,
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": PERSISTENT,
            # Its default keeps what is used again within 1e9 elements: all of most models, from forward to backward.
            "stage3_max_reuse_distance": 0,
        }
    pinned = {"pin_memory": device != "cpu"}
    zero |= {"offload_optimizer": dict(pinned), "offload_param": dict(pinned)}
    return {"zero_optimization": zero, "steps_per_print": None, "wall_clock_breakdown": False}


def _buckets(stage: int, size_mb: float) -> dict[str, Any]:
    elements = max(2, int(size_mb * 2**20 / 4) // 2 * 2)
    found = {"reduce_bucket_size": elements, "allgather_bucket_size": elements}
    return found | {"stage3_prefetch_bucket_size": elements} if stage == 3 else found


def _owned(options: Any, precision: PrecisionConfig) -> dict[str, Any]:
    """One sample, one micro-batch and no clipping: the arithmetic is ours, batch by batch. The caller owns the
    accumulation, so that any number of backwards add up before a step."""
    zero: dict[str, Any] = {"stage": options.stage, "round_robin_gradients": False}
    if options.bucket_mb is not None:
        zero |= _buckets(options.stage, options.bucket_mb)
    for section, device in (("offload_optimizer", options.offload), ("offload_param", options.offload_parameters)):
        zero[section] = {"device": device} | ({"nvme_path": options.nvme_path} if device == "nvme" else {})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": precision.reduce,
        "zero_optimization": zero,
    }
    if precision.master == "bf16":
        states = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        config["bf16"] = {"enabled": True, **states}
    return config


def _said(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without what leaves a value to others: Hugging Face's word for that is "auto"."""
    found = {key: _said(item) if isinstance(item, Mapping) else item for key, item in value.items()}
    return {key: item for key, item in found.items() if item != "auto"}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        found[key] = _over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return found
