"""Files as `accelerate config` writes them, and a config to translate them into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from disttrain.config import Config, ConfigProblemsError, load_config
from disttrain.config.foreign.accelerate import translate
from disttrain.config.foreign.accelerate_settings import read_file

PROJECT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = {
    "run": {"steps": 4},
    "data": {"train": {"target": "byte_text"}, "global_batch": 32, "micro_batch": 8},
    "optim": {"target": "torch.optim.AdamW"},
    "strategy": {"name": "accelerate"},
}
FILE: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_GPU",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": True,
}
"""What `accelerate config` writes for two processes."""


def fsdp(**more: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **more}}


def deepspeed(**more: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": more}


def degrees(replicate: int = 1, shard: int = 1, tensor: int = 1, **more: Any) -> dict[str, Any]:
    names = {"dp_replicate_size": replicate, "dp_shard_size": shard, "tp_size": tensor, **more}
    return {**fsdp(), "parallelism_config": {f"parallelism_config_{name}": size for name, size in names.items()}}


def written(folder: Path, **more: Any) -> Path:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**FILE, **more}), encoding="utf-8")
    return path


def config_with(**sections: Any) -> Config:
    return load_config({**CONFIG, **sections})


def from_accelerate(config: Config) -> dict[str, Any]:
    """Maps each key that accelerate set to its value."""
    found = {}
    for key, source in config.sources.items():
        if source.startswith("accelerate: "):
            found[key] = config.values()
            for part in key.split("."):
                found[key] = found[key][part]
    return found


def rejected(folder: Path, config: Config | None = None, **more: Any) -> ConfigProblemsError:
    with pytest.raises(ConfigProblemsError) as error:
        translate(read_file(written(folder, **more)), config or config_with())
    return error.value
