"""Reads accelerate's settings from its file, or from the variables that `accelerate launch` sets for its workers.

Both become `Settings`: the dotted keys of the file, each with its value or accelerate's default, and with its location
for messages. Names and defaults are those of accelerate 1.15 (commands/launch.py, utils/launch.py,
commands/config/config_args.py). Unknown keys are rejected. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disttrain.config.files.yaml_lines import parse_document
from disttrain.config.problems import ConfigProblem, ConfigProblemsError, shown, suggest


@dataclass(frozen=True)
class _Key:
    """The variable that passes a key to workers ("" if none does), the type of its value, and its default."""

    variable: str
    kind: str
    default: Any = None


_FSDP = {
    "fsdp_version": _Key("FSDP_VERSION", "int", 1),
    "fsdp_sharding_strategy": _Key("FSDP_SHARDING_STRATEGY", "text", "FULL_SHARD"),
    "fsdp_reshard_after_forward": _Key("FSDP_RESHARD_AFTER_FORWARD", "any", True),
    "fsdp_offload_params": _Key("FSDP_OFFLOAD_PARAMS", "bool", False),
    "fsdp_min_num_params": _Key("FSDP_MIN_NUM_PARAMS", "int", 100_000_000),
    "fsdp_auto_wrap_policy": _Key("FSDP_AUTO_WRAP_POLICY", "text"),
    "fsdp_transformer_layer_cls_to_wrap": _Key("FSDP_TRANSFORMER_CLS_TO_WRAP", "text"),
    "fsdp_backward_prefetch": _Key("FSDP_BACKWARD_PREFETCH", "text"),
    "fsdp_state_dict_type": _Key("FSDP_STATE_DICT_TYPE", "text"),
    "fsdp_forward_prefetch": _Key("FSDP_FORWARD_PREFETCH", "bool", False),
    "fsdp_use_orig_params": _Key("FSDP_USE_ORIG_PARAMS", "bool", True),
    "fsdp_cpu_ram_efficient_loading": _Key("FSDP_CPU_RAM_EFFICIENT_LOADING", "bool", True),
    "fsdp_sync_module_states": _Key("FSDP_SYNC_MODULE_STATES", "bool", True),
    "fsdp_activation_checkpointing": _Key("FSDP_ACTIVATION_CHECKPOINTING", "bool", False),
    "fsdp_activation_checkpointing_offload": _Key("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "bool", False),
    "fsdp_ignored_modules": _Key("FSDP_IGNORED_MODULES", "text"),
}
_DEEPSPEED = {
    "zero_stage": _Key("ACCELERATE_DEEPSPEED_ZERO_STAGE", "int"),
    "gradient_accumulation_steps": _Key("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "number"),
    "gradient_clipping": _Key("ACCELERATE_GRADIENT_CLIPPING", "number"),
    "offload_optimizer_device": _Key("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "text"),
    "offload_param_device": _Key("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "text"),
    "offload_optimizer_nvme_path": _Key("", "text"),
    "offload_param_nvme_path": _Key("", "text"),
    "zero3_init_flag": _Key("ACCELERATE_DEEPSPEED_ZERO3_INIT", "bool"),
    "zero3_save_16bit_model": _Key("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "bool"),
    "deepspeed_config_file": _Key("ACCELERATE_DEEPSPEED_CONFIG_FILE", "text"),
    "deepspeed_moe_layer_cls_names": _Key("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "text"),
    "deepspeed_hostfile": _Key("", "text"),
    "deepspeed_exclusion_filter": _Key("", "text"),
    "deepspeed_inclusion_filter": _Key("", "text"),
    "deepspeed_multinode_launcher": _Key("", "text"),
}
_PARALLELISM = {
    "parallelism_config_dp_replicate_size": _Key("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "int", 1),
    "parallelism_config_dp_shard_size": _Key("PARALLELISM_CONFIG_DP_SHARD_SIZE", "int", 1),
    "parallelism_config_tp_size": _Key("PARALLELISM_CONFIG_TP_SIZE", "int", 1),
    "parallelism_config_cp_size": _Key("PARALLELISM_CONFIG_CP_SIZE", "int", 1),
    "parallelism_config_cp_backend": _Key("", "text"),
    "parallelism_config_cp_comm_strategy": _Key("", "text"),
    "parallelism_config_sp_size": _Key("PARALLELISM_CONFIG_SP_SIZE", "int", 1),
    "parallelism_config_sp_backend": _Key("", "text"),
    "parallelism_config_sp_seq_length": _Key("", "any"),
    "parallelism_config_sp_seq_length_is_variable": _Key("", "bool"),
    "parallelism_config_sp_attn_implementation": _Key("", "text"),
}
_DYNAMO = {
    "dynamo_backend": _Key("ACCELERATE_DYNAMO_BACKEND", "text", "NO"),
    "dynamo_mode": _Key("ACCELERATE_DYNAMO_MODE", "text", "default"),
    "dynamo_use_fullgraph": _Key("ACCELERATE_DYNAMO_USE_FULLGRAPH", "bool", False),
    "dynamo_use_dynamic": _Key("ACCELERATE_DYNAMO_USE_DYNAMIC", "bool", False),
    "dynamo_use_regional_compilation": _Key("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "bool", False),
}
_SECTIONS = {
    "fsdp_config": _FSDP,
    "deepspeed_config": _DEEPSPEED,
    "parallelism_config": _PARALLELISM,
    "dynamo_config": _DYNAMO,
}
_TOP = {
    "compute_environment": _Key("", "text", "LOCAL_MACHINE"),
    "distributed_type": _Key("", "text"),
    "mixed_precision": _Key("ACCELERATE_MIXED_PRECISION", "text", "no"),
    "num_processes": _Key("", "int"),
    "num_machines": _Key("", "int", 1),
    "enable_cpu_affinity": _Key("ACCELERATE_CPU_AFFINITY", "bool", False),
}
# Keys about starting processes, and about TPUs, which the distributed type excludes. Any value is accepted.
_LAUNCHING = {
    *("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network", "gpu_ids", "debug"),
    *("main_training_function", "use_cpu", "downcast_bf16", "command_file", "commands", "tpu_name", "tpu_zone"),
    *("tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env"),
}
_FOREIGN = {
    "fp8_config": "remove it, and write mixed_precision: bf16",
    "megatron_lm_config": "use distributed_type: FSDP with parallelism_config, or DEEPSPEED",
    "mpirun_config": "remove it; distributed_type: MULTI_GPU with use_cpu: true starts processes on CPU",
}


@dataclass(frozen=True)
class Settings:
    """Accelerate's settings.

    `values` and `places` are by dotted key; a place is `file:line` or the name of a variable. `native` is the content
    of DeepSpeed's JSON, if the settings name one. `world_size` is None where a file does not state it.
    """

    name: str
    world_size: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    native: dict[str, Any] | None = None
    problems: tuple[ConfigProblem, ...] = ()


def read_file(path: str | Path) -> Settings:
    """Read a file that `accelerate config` wrote. Local; raises ConfigProblemsError for a file of another kind."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigProblemsError(
            [
                ConfigProblem(
                    "--accelerate", str(path), f"a file that cannot be read: {error}", "name accelerate's YAML file"
                )
            ]
        ) from None
    document = parse_document(text, str(path))
    if not isinstance(document.value, Mapping):
        problem = ConfigProblem("", f"{path}:1", "not a mapping", "write the file with `accelerate config`")
        raise ConfigProblemsError([problem])
    said: dict[str, Any] = {}
    problems = list(document.problems)
    places = {".".join(map(str, at)): f"{path}:{line}" for at, line in document.lines.items()}
    for key, value in document.value.items():
        where = places.get(key, str(path))
        if key in _SECTIONS:
            _read_section(key, value, where, said, places, problems)
        elif key == "dynamo_backend":  # as in older versions of accelerate
            said["dynamo_config.dynamo_backend"], places["dynamo_config.dynamo_backend"] = value, where
        elif key in _FOREIGN and value:
            problems.append(ConfigProblem(key, where, "disttrain does not support this section", _FOREIGN[key]))
        elif key in _TOP and key != "enable_cpu_affinity":  # accelerate reads that from its command line only
            said[key] = value
        elif key not in _LAUNCHING and key not in _FOREIGN and key not in _TOP:
            known = [*_TOP, *_SECTIONS, *_LAUNCHING, *_FOREIGN]
            problems.append(ConfigProblem(key, where, f"the unknown key {key!r}", suggest(key, known)))
    return _settled(str(path), said, places, problems)


def read_environment(variables: Mapping[str, str], world_size: int) -> Settings:
    """Read the settings that `accelerate launch` passed to this process, one of `world_size`. Local.

    Reads DeepSpeed's JSON from the disk, if the settings name one.
    """
    kind = next((one for one in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if _yes(variables, f"ACCELERATE_USE_{one}")), "")
    said: dict[str, Any] = {"distributed_type": kind or ("MULTI_GPU" if "WORLD_SIZE" in variables else "NO")}
    places = {"distributed_type": f"ACCELERATE_USE_{kind}" if kind else "accelerate launch"}
    sections = [("", _TOP), ("dynamo_config.", _DYNAMO)]
    sections += [("fsdp_config.", _FSDP)] if kind == "FSDP" else []
    sections += [("deepspeed_config.", _DEEPSPEED)] if kind == "DEEPSPEED" else []
    sections += [("parallelism_config.", _PARALLELISM)] if _yes(variables, "ACCELERATE_USE_PARALLELISM_CONFIG") else []
    for prefix, keys in sections:
        for name, key in keys.items():
            if key.variable and key.variable in variables:
                said[prefix + name], places[prefix + name] = variables[key.variable], key.variable
    return _settled("accelerate launch", said, places, [], world_size)


def _yes(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() == "true"


def _read_section(
    section: str, value: Any, where: str, said: dict[str, Any], places: dict[str, str], problems: list[ConfigProblem]
) -> None:
    """Add a section's keys. Accelerate also accepts the keys of fsdp_config and dynamo_config without their prefix."""
    if not isinstance(value, Mapping):
        if value:
            problems.append(ConfigProblem(section, where, shown(value), "write a mapping"))
        return
    prefix = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}.get(section, "")
    for name, item in value.items():
        full_name = name if name.startswith(prefix) else prefix + name
        place = places.get(f"{section}.{name}", where)
        if full_name not in _SECTIONS[section]:
            fix = suggest(name, _SECTIONS[section])
            problems.append(ConfigProblem(f"{section}.{name}", place, f"the unknown key {name!r}", fix))
        else:
            said[f"{section}.{full_name}"], places[f"{section}.{full_name}"] = item, place


def _settled(
    name: str,
    said: dict[str, Any],
    places: dict[str, str],
    problems: list[ConfigProblem],
    world_size: int | None = None,
) -> Settings:
    """Convert strings to values, add accelerate's defaults, and read DeepSpeed's JSON."""
    kind = said.get("distributed_type")
    active = {"fsdp_config": kind == "FSDP", "deepspeed_config": kind == "DEEPSPEED", "dynamo_config": True}
    active["parallelism_config"] = any(key.startswith("parallelism_config.") for key in said)
    keys = dict(_TOP)
    for section, known in _SECTIONS.items():
        keys |= {f"{section}.{one}": key for one, key in known.items()} if active[section] else {}
    values: dict[str, Any] = {}
    for dotted, key in keys.items():
        values[dotted] = key.default
        if said.get(dotted) is None:
            places.pop(dotted, None)
            continue
        try:
            values[dotted] = _typed(said[dotted], key.kind)
        except ValueError as error:
            problems.append(ConfigProblem(dotted, places.get(dotted, name), shown(said[dotted]), str(error)))
    native = None
    file = values.get("deepspeed_config.deepspeed_config_file")
    if file not in (None, "none"):
        native = _read_native(file, places["deepspeed_config.deepspeed_config_file"], problems)
    if (values["num_processes"] or 0) > 0:  # -1: the command line states it
        world_size = world_size or values["num_processes"]
    return Settings(name, world_size, values, places, native, tuple(problems))


def _typed(value: Any, kind: str) -> Any:
    """Convert a value of the file, or the string in a variable. Raises ValueError whose message is the fix."""
    text = str(value).strip()
    if kind == "bool":
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("write true or false")
        return text.lower() in ("true", "1", "yes")
    if kind in ("int", "number"):
        if kind == "number" and text == "auto":
            return text
        try:
            found = float(text)
        except ValueError:
            raise ValueError("write a number") from None
        if isinstance(value, bool) or (kind == "int" and not found.is_integer()):
            raise ValueError("write a whole number")
        return int(found) if found.is_integer() else found
    if kind == "text":
        if isinstance(value, bool):
            raise ValueError("quote it: YAML reads yes, no, on and off as true and false")
        return text
    return {"true": True, "false": False}.get(text.lower(), value)


def _read_native(file: str, where: str, problems: list[ConfigProblem]) -> dict[str, Any] | None:
    """Read DeepSpeed's JSON, relative to the working directory, as accelerate does."""
    key = "deepspeed_config.deepspeed_config_file"
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(
            ConfigProblem(key, where, f"{file}, which cannot be read: {error}", "name DeepSpeed's JSON file")
        )
        return None
    if not isinstance(found, dict):
        problems.append(ConfigProblem(key, where, f"{file}, which is no JSON object", "name DeepSpeed's JSON file"))
        return None
    return found
