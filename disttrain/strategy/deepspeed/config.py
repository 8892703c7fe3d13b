"""Builds DeepSpeed's config from disttrain's. States every key that affects arithmetic or memory.

Three layers override each other: disttrain's defaults, the user's native JSON, and the keys that disttrain fixes. The
config has already rejected native values that contradict the last layer. Pure; imports no deepspeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disttrain.config.schema import PrecisionConfig

BUCKET_MB = 25.0
"""The default of `bucket_mb`, the same as DDP's. DeepSpeed's default buckets take 2 GiB each on every rank."""

PERSISTENT = 10_000
"""Stage 3 keeps parameters of at most this many elements complete on every rank: norms and biases, whose gathers cost
more time than the memory they save is worth. DeepSpeed's default, 100,000, would keep all of a small model."""

REPLACED = ("train_batch_size", "optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast")
"""Keys of a native JSON that were compared with disttrain's config and are expressed by other keys here."""


def engine_config(options: Any, precision: PrecisionConfig, device: str) -> dict[str, Any]:
    """The config for `deepspeed.initialize` on a device of type `device`."""
    native = {key: value for key, value in (options.native or {}).items() if key not in REPLACED}
    return _merge(_merge(_defaults(options.stage, device), _without_auto(native)), _fixed(options, precision))


def bound_gathered(config: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """Bound the parameters that stage 3 gathers, for a model whose largest module has `largest` elements.

    While that module computes, one more bucket may be gathered. DeepSpeed gathers up to a bucket ahead at every module,
    and by default up to 1e9 elements, which is all of most models.
    """
    zero = config["zero_optimization"]
    live = largest + int(zero["stage3_prefetch_bucket_size"])
    return {**config, "zero_optimization": {"stage3_max_live_parameters": live, **zero}}


def _defaults(stage: int, device: str) -> dict[str, Any]:
    """The keys that a native JSON may override."""
    zero = {
        **_buckets(stage, BUCKET_MB),
        # Stage 3 copies a bucket's gradients together when it reduces them, and needs no buffer before.
        "contiguous_gradients": stage < 3,
        "overlap_comm": stage == 3,
        "reduce_scatter": True,
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": PERSISTENT,
            # The default keeps parameters that are used again within 1e9 elements: all of most models, from forward to
            # backward.
            "stage3_max_reuse_distance": 0,
        }
    pinned = {"pin_memory": device != "cpu"}
    zero |= {"offload_optimizer": dict(pinned), "offload_param": dict(pinned)}
    return {"zero_optimization": zero, "steps_per_print": None, "wall_clock_breakdown": False}


def _buckets(stage: int, size_mb: float) -> dict[str, Any]:
    """Bucket sizes in elements of 4 bytes. DeepSpeed requires an even number."""
    elements = max(2, int(size_mb * 2**20 / 4) // 2 * 2)
    found = {"reduce_bucket_size": elements, "allgather_bucket_size": elements}
    return found | {"stage3_prefetch_bucket_size": elements} if stage == 3 else found


def _fixed(options: Any, precision: PrecisionConfig) -> dict[str, Any]:
    """The keys that disttrain fixes.

    Batch sizes of 1 and no clipping leave the arithmetic to disttrain. The caller manages accumulation, so that any
    number of backwards add up before a step.
    """
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


def _without_auto(value: Mapping[str, Any]) -> dict[str, Any]:
    """Remove values that are "auto", which Hugging Face's trainers fill in."""
    found = {key: _without_auto(item) if isinstance(item, Mapping) else item for key, item in value.items()}
    return {key: item for key, item in found.items() if item != "auto"}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `above` over `below`, section by section."""
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        found[key] = _merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return found
