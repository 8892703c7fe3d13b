"""Lists every key of DeepSpeed 0.19.8's JSON, because DeepSpeed ignores unknown keys. Imports no torch.

The keys come from DeepSpeed's config models and constants; a test compares the sections with the installed package.
`ELSEWHERE` lists keys that disttrain configures in another section, and `REMOVED` those that DeepSpeed has removed.
"""

from __future__ import annotations

_OFFLOAD = ("device", "nvme_path", "buffer_count", "pin_memory")
_ENABLED = ("enabled",)

SECTIONS: dict[str, tuple[str, ...]] = {
    "zero_optimization": (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm"),
        *("load_from_fp32_weights", "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow"),
        *("sub_group_size", "cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload"),
        *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
        *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
        *("stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters"),
        *("legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply"),
        *("log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module"),
    ),
    "zero_optimization.offload_param": (*_OFFLOAD, "buffer_size", "max_in_cpu"),
    "zero_optimization.offload_optimizer": (
        *_OFFLOAD,
        *("pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload", "cpuadam_cores_perc"),
    ),
    "zero_optimization.leaf_module": ("classes", "names", "name_suffixes"),
    "fp16": (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
    ),
    "bf16": (
        *("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads"),
        "bf16_optimizer_states",
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "comms_logger": ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "flops_profiler": (
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    ),
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
}
"""The keys of each section. A dot separates a section from the section that contains it."""

PLAIN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("managed_gradient_accumulation", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
    *("communication_data_type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print"),
    *("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_allgather", "disable_python_gc", "log_level"),
    *("vocabulary_size", "timers"),
)
"""Keys at the top level that are not sections."""

ELSEWHERE = {
    "bfloat16": "write the section as bf16",
    "activation_checkpointing": "use memory.recompute",
    "autotuning": "run DeepSpeed's autotuner separately, and write its results here",
    "checkpoint": "use the section checkpoint",
    "comet": "use report.trackers",
    "compile": "use memory.compile",
    "csv_monitor": "read metrics.jsonl",
    "data_efficiency": "define the order of samples in data.train",
    "dataloader_drop_last": "use data.last",
    "datastates_ckpt": "use the section checkpoint",
    "expert_parallel": "train the experts as ordinary layers: expert parallelism is planned for a later release",
    "hybrid_engine": "generate with `disttrain sample`",
    "pipeline": "leave it out: pipelines are planned for a later release",
    "sequence_parallel_size": "leave it out: use strategy.fsdp.tensor for sequence parallelism",
    "seq_parallel_communication_data_type": "leave it out with sequence_parallel_size",
    "tensor_parallel": "use strategy.name=fsdp with mesh.tensor",
    "tensorboard": "use report.trackers",
    "use_data_before_expert_parallelism": "leave it out with expert_parallel",
    "wandb": "use report.trackers",
    "weight_quantization": "leave it out: weights are trained without quantization",
}
"""Keys that DeepSpeed knows and disttrain does not pass to it, with the fix for each."""

REMOVED = (
    *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
    *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
    *("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
    "zero_optimization.zeropp_loco_param",
)
"""Keys for which DeepSpeed 0.19 raises an error."""

FIXED = {
    "managed_gradient_accumulation": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "disable_allgather": False,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.elastic_checkpoint": False,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.ignore_unused_parameters": True,
    "zero_optimization.zenflow": None,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}
"""Values that exact gradients, and checkpoints that any layout can load, depend on."""


def known_at(section: str) -> tuple[str, ...]:
    """The known keys of a section; "" is the top level. Pure."""
    if section:
        return SECTIONS.get(section, ())
    return (*PLAIN, *(name for name in SECTIONS if "." not in name), *ELSEWHERE)
