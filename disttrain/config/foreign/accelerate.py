"""`strategy.name=accelerate`: what accelerate was told, as keys of this config. Pure; imports no torch.

Owns which of accelerate's settings mean what here. What cannot be honoured is refused by its name, all at once; what
the config itself states stands beside accelerate's only where both say the same.
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
# Key -> the values that come to what disttrain does anyway, and what to do about any other.
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "compute_environment": (
        ("LOCAL_MACHINE",),
        "write LOCAL_MACHINE, and start the processes with `accelerate launch`",
    ),
    "enable_cpu_affinity": ((False,), "set it to false; bind processes with numactl"),
    "dynamo_config.dynamo_mode": (("default",), "take it out: blocks are compiled in torch's default mode"),
    "dynamo_config.dynamo_use_fullgraph": ((False,), "set it to false"),
    "dynamo_config.dynamo_use_dynamic": ((False,), "set it to false"),
    "fsdp_config.fsdp_sharding_strategy": (
        ("FULL_SHARD", "1"),
        "take it out; FSDP2's word is fsdp_reshard_after_forward",
    ),
    "fsdp_config.fsdp_backward_prefetch": ((None, "BACKWARD_PRE"), "take it out: FSDP2 prefetches before each block"),
    "fsdp_config.fsdp_state_dict_type": (
        (None, "SHARDED_STATE_DICT"),
        "write SHARDED_STATE_DICT; disttrain.load(RUN) gives the whole model",
    ),
    "fsdp_config.fsdp_use_orig_params": ((True,), "take it out: FSDP2 keeps the parameters that they are"),
    "fsdp_config.fsdp_sync_module_states": ((True,), "take it out: initial weights are the same on all ranks"),
    "fsdp_config.fsdp_activation_checkpointing_offload": ((False,), "set it to false"),
    "fsdp_config.fsdp_ignored_modules": ((None,), "take it out: every parameter is sharded"),
    "deepspeed_config.zero3_save_16bit_model": ((None, False), "set it to false; checkpoints hold what was trained"),
    "deepspeed_config.deepspeed_moe_layer_cls_names": ((None,), "take it out"),
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
    """`config` with its strategy, mesh and precision from accelerate, each value's source `accelerate: KEY`.

    Raises ConfigFaultsError with everything that cannot be honoured or that the config itself says otherwise.
    """
    found = Translation(settings, config, faults=list(settings.faults))
    for key, (fine, do) in _ANYWAY.items():
        if key in settings.values and settings.values[key] not in fine:
            found.refuse(key, "which disttrain does not do", do)
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


def asked_otherwise(settings: Settings, config: Config) -> str:
    """What accelerate was told where the config, which counts, says otherwise; empty where it does not. Pure."""
    name, compute = _STRATEGIES.get(settings.values["distributed_type"]), settings.values["mixed_precision"]
    differs = {
        f"{name} ({settings.values['distributed_type']}), the config for {config.strategy.name}": (
            name in ("fsdp", "deepspeed") and name != config.strategy.name
        ),
        f"{compute}, the config for {config.precision.compute}": compute not in ("no", config.precision.compute),
    }
    return " and ".join(text for text, does in differs.items() if does)


def _strategy(found: Translation) -> str | None:
    """The strategy that the distributed type stands for, if what it starts is one world."""
    kind, processes, machines = (found.said(key) for key in ("distributed_type", "num_processes", "num_machines"))
    if kind not in _STRATEGIES:
        why = "which is no way to train here" if kind else "so accelerate does not know what to start"
        found.refuse("distributed_type", why, *_OTHERS)
        return None
    if processes is not None and processes > 1 and _STRATEGIES[kind] == "none":
        found.refuse("num_processes", f"and accelerate starts one for distributed_type: {kind}", *_OTHERS)
    elif processes is not None and machines and processes % machines:
        do = f"make it a multiple of {machines}"
        found.refuse("num_processes", f"of which accelerate starts {processes // machines} on each machine", do)
    if kind == "FSDP" and found.said("fsdp_config.fsdp_version") != 2:
        do = "set fsdp_version: 2 (`accelerate to-fsdp2` converts the file)"
        found.refuse("fsdp_config.fsdp_version", "the FSDP that torch no longer develops", do)
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
        do = "let dp_replicate_size x dp_shard_size x tp_size be the number of processes"
        why = f"with which {degrees} = {product} is not the world's {world} process(es)"
        found.refuse("parallelism_config.parallelism_config_dp_shard_size", why, do)


def _compile(found: Translation) -> None:
    backend = str(found.said("dynamo_config.dynamo_backend")).upper()
    if backend == "INDUCTOR":
        found.put("memory.compile", True, "dynamo_config.dynamo_backend")
    elif backend != "NO":
        found.refuse("dynamo_config.dynamo_backend", "which disttrain does not compile with", "write INDUCTOR, or NO")


def _fsdp(found: Translation) -> None:
    def key(name: str) -> str:
        return f"fsdp_config.fsdp_{name}"

    reshard = found.said(key("reshard_after_forward"))
    if isinstance(reshard, bool):
        found.put("strategy.fsdp.reshard", reshard, key("reshard_after_forward"))
    else:
        found.refuse(key("reshard_after_forward"), "a word of FSDP1", "write true or false")
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
        do = "write TRANSFORMER_BASED_WRAP with fsdp_transformer_layer_cls_to_wrap, or leave both out: repeated blocks"
        found.refuse(key("auto_wrap_policy"), "and disttrain chooses blocks by class or name", do)


def _precision(found: Translation, native: Native) -> None:
    """`mixed_precision`, or the type that DeepSpeed's own JSON switches on where accelerate names none."""
    named, key = found.said("mixed_precision"), "mixed_precision"
    types = {one: native.take(f"{one}.enabled") for one in ("bf16", "fp16")}
    for one, enabled in types.items():
        if enabled and named == "no":
            named, key = one, "deepspeed_config.deepspeed_config_file"
        elif enabled is not None and enabled != (named == one):
            do = 'let both say the same, or write "auto" there'
            found.refuse("mixed_precision", f"where DeepSpeed's JSON has {one}.enabled: {shown(enabled)}", do)
    if named not in ("no", "bf16", "fp16"):
        found.refuse("mixed_precision", "which disttrain does not compute in", "write bf16, fp16 or 'no'")
    elif named != "no" or found.config.precision.compute != "fp64":  # double precision is no mixed one either
        found.put("precision.compute", "fp32" if named == "no" else named, key)
