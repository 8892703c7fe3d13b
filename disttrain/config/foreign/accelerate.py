"""Translates accelerate's settings into keys of a config, for `strategy.name=accelerate`. Pure; imports no torch.

This module defines which settings of accelerate mean what in disttrain. Settings that have no equivalent are rejected
by name, all at once. A key that the config states as well must have the same value in both.
"""

from __future__ import annotations

from typing import Any

from disttrain.config.foreign.accelerate_deepspeed import Native, translate_deepspeed
from disttrain.config.foreign.accelerate_settings import Settings
from disttrain.config.foreign.translation import Translation
from disttrain.config.problems import shown
from disttrain.config.schema import Config
from disttrain.config.strategy_options import TRANSLATED

_STRATEGIES = {"NO": "none", "MULTI_CPU": "none", "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}
_OTHERS = ("use MULTI_GPU (ddp), FSDP with fsdp_version: 2, or DEEPSPEED; with use_cpu: true they run on CPU",)
# Key -> the values that describe what disttrain does in any case, and the fix for other values.
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "compute_environment": (
        ("LOCAL_MACHINE",),
        "write LOCAL_MACHINE, and start the processes with `accelerate launch`",
    ),
    "enable_cpu_affinity": ((False,), "set it to false; bind processes with numactl"),
    "dynamo_config.dynamo_mode": (("default",), "remove it: blocks are compiled in torch's default mode"),
    "dynamo_config.dynamo_use_fullgraph": ((False,), "set it to false"),
    "dynamo_config.dynamo_use_dynamic": ((False,), "set it to false"),
    "fsdp_config.fsdp_sharding_strategy": (
        ("FULL_SHARD", "1"),
        "remove it; FSDP2's key is fsdp_reshard_after_forward",
    ),
    "fsdp_config.fsdp_backward_prefetch": ((None, "BACKWARD_PRE"), "remove it: FSDP2 prefetches before each block"),
    "fsdp_config.fsdp_state_dict_type": (
        (None, "SHARDED_STATE_DICT"),
        "write SHARDED_STATE_DICT; disttrain.load(RUN) loads the complete model",
    ),
    "fsdp_config.fsdp_use_orig_params": ((True,), "remove it: FSDP2 keeps the original parameters"),
    "fsdp_config.fsdp_sync_module_states": ((True,), "remove it: initial weights are the same on all ranks"),
    "fsdp_config.fsdp_activation_checkpointing_offload": ((False,), "set it to false"),
    "fsdp_config.fsdp_ignored_modules": ((None,), "remove it: every parameter is sharded"),
    "deepspeed_config.zero3_save_16bit_model": ((None, False), "set it to false; checkpoints have the trained dtype"),
    "deepspeed_config.deepspeed_moe_layer_cls_names": ((None,), "remove it"),
    "deepspeed_config.deepspeed_multinode_launcher": (
        (None, "standard", "pdsh", "nossh", "slurm"),
        "write standard: torchrun on each machine",
    ),
    "parallelism_config.parallelism_config_cp_size": ((1,), "set it to 1"),
    "parallelism_config.parallelism_config_sp_size": ((1,), "set it to 1"),
}
_DEGREES = {
    "mesh.replicate": "parallelism_config_dp_replicate_size",
    "mesh.shard": "parallelism_config_dp_shard_size",
    "mesh.tensor": "parallelism_config_tp_size",
}


def translate(settings: Settings, config: Config) -> Config:
    """A copy of `config` with strategy, mesh and precision from accelerate, each with the source `accelerate: KEY`.

    Raises ConfigProblemsError with every setting that has no equivalent or contradicts the config.
    """
    found = Translation(settings, config, problems=list(settings.problems))
    for key, (fine, fix) in _ANYWAY.items():
        if key in settings.values and settings.values[key] not in fine:
            found.reject(key, "which disttrain does not support", fix)
    name = _strategy(found)
    if name is not None:
        found.put("strategy.name", name, "distributed_type", TRANSLATED)
    _mesh(found)
    _compile(found)
    if name == "fsdp":
        _fsdp(found)
    native = Native(settings.native or {})
    _precision(found, native)
    if name == "deepspeed":
        translate_deepspeed(found, native)
    return found.laid_over()


def differing_settings(settings: Settings, config: Config) -> str:
    """Accelerate's settings that differ from the config, which decides; empty where none differs. Pure."""
    name, compute = _STRATEGIES.get(settings.values["distributed_type"]), settings.values["mixed_precision"]
    differs = {
        f"{name} ({settings.values['distributed_type']}), the config for {config.strategy.name}": (
            name in ("fsdp", "deepspeed") and name != config.strategy.name
        ),
        f"{compute}, the config for {config.precision.compute}": compute not in ("no", config.precision.compute),
    }
    return " and ".join(text for text, does in differs.items() if does)


def _strategy(found: Translation) -> str | None:
    """The strategy for the distributed type, or None. Checks that accelerate starts all processes in one world."""
    kind, processes, machines = (found.said(key) for key in ("distributed_type", "num_processes", "num_machines"))
    if kind not in _STRATEGIES:
        why = "which disttrain does not support" if kind else "so accelerate does not know what to start"
        found.reject("distributed_type", why, *_OTHERS)
        return None
    if processes is not None and processes > 1 and _STRATEGIES[kind] == "none":
        found.reject("num_processes", f"but accelerate starts one for distributed_type: {kind}", *_OTHERS)
    elif processes is not None and machines and processes % machines:
        fix = f"make it a multiple of {machines}"
        found.reject("num_processes", f"of which accelerate starts {processes // machines} on each machine", fix)
    if kind == "FSDP" and found.said("fsdp_config.fsdp_version") != 2:
        fix = "set fsdp_version: 2 (`accelerate to-fsdp2` converts the file)"
        found.reject("fsdp_config.fsdp_version", "the FSDP that torch no longer develops", fix)
    return _STRATEGIES[kind]


def _mesh(found: Translation) -> None:
    sizes = {ours: found.said(f"parallelism_config.{key}") for ours, key in _DEGREES.items()}
    if None in sizes.values():
        return
    world, product = found.settings.world_size, 1
    for ours, size in sizes.items():
        found.put(ours, size, f"parallelism_config.{_DEGREES[ours]}", -1)
        product *= size
    if world is not None and product != world:
        degrees = " x ".join(str(size) for size in sizes.values())
        fix = "let dp_replicate_size x dp_shard_size x tp_size be the number of processes"
        why = f"with which {degrees} = {product} is not the world's {world} process(es)"
        found.reject("parallelism_config.parallelism_config_dp_shard_size", why, fix)


def _compile(found: Translation) -> None:
    backend = str(found.said("dynamo_config.dynamo_backend")).upper()
    if backend == "INDUCTOR":
        found.put("memory.compile", True, "dynamo_config.dynamo_backend")
    elif backend != "NO":
        found.reject("dynamo_config.dynamo_backend", "which disttrain does not use to compile", "write INDUCTOR or NO")


def _fsdp(found: Translation) -> None:
    def key(name: str) -> str:
        return f"fsdp_config.fsdp_{name}"

    reshard = found.said(key("reshard_after_forward"))
    if isinstance(reshard, bool):
        found.put("strategy.fsdp.reshard", reshard, key("reshard_after_forward"))
    else:
        found.reject(key("reshard_after_forward"), "which is a value for FSDP1", "write true or false")
    found.put("strategy.fsdp.offload", found.said(key("offload_params")), key("offload_params"))
    if found.said(key("forward_prefetch")):
        found.put("strategy.fsdp.prefetch_forward", 1, key("forward_prefetch"))
    if found.said(key("activation_checkpointing")):
        found.put("memory.recompute", "full", key("activation_checkpointing"))
    policy, classes = found.said(key("auto_wrap_policy")), found.said(key("transformer_layer_cls_to_wrap"))
    if policy == "NO_WRAP":
        found.put("strategy.fsdp.blocks", (), key("auto_wrap_policy"))
    elif policy == "TRANSFORMER_BASED_WRAP" and classes:
        names = tuple(name.strip() for name in classes.split(","))
        found.put("strategy.fsdp.blocks", names, key("transformer_layer_cls_to_wrap"))
    elif policy not in (None, "TRANSFORMER_BASED_WRAP"):
        fix = "write TRANSFORMER_BASED_WRAP with fsdp_transformer_layer_cls_to_wrap, or neither for repeated blocks"
        found.reject(key("auto_wrap_policy"), "but disttrain chooses blocks by class or name", fix)


def _precision(found: Translation, native: Native) -> None:
    """Translate `mixed_precision`, or else the dtype that DeepSpeed's JSON enables."""
    named, key = found.said("mixed_precision"), "mixed_precision"
    types = {one: native.take(f"{one}.enabled") for one in ("bf16", "fp16")}
    for one, enabled in types.items():
        if enabled and named == "no":
            named, key = one, "deepspeed_config.deepspeed_config_file"
        elif enabled is not None and enabled != (named == one):
            fix = 'make both equal, or write "auto" there'
            found.reject("mixed_precision", f"but DeepSpeed's JSON has {one}.enabled: {shown(enabled)}", fix)
    if named not in ("no", "bf16", "fp16"):
        found.reject("mixed_precision", "which disttrain does not support", "write bf16, fp16 or 'no'")
    elif named != "no" or found.config.precision.compute != "fp64":  # fp64 is not mixed precision either
        found.put("precision.compute", "fp32" if named == "no" else named, key)
