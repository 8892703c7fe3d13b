"""The environment of `accelerate launch` matches its file; `disttrain check --accelerate` shows it, without torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accelerate_files import PROJECT, config_with, deepspeed, fsdp, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.config import ConfigProblemsError
from disttrain.config.foreign.accelerate import differing_settings, translate
from disttrain.config.foreign.accelerate_settings import read_environment, read_file


def test_bound_cores_are_rejected_where_accelerate_passes_them_on() -> None:
    handed = {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "ACCELERATE_CPU_AFFINITY": "1"}
    with pytest.raises(ConfigProblemsError, match=r"enable_cpu_affinity \(ACCELERATE_CPU_AFFINITY\)"):
        translate(read_environment(handed, 2), config_with())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, ""),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp (FSDP), the config for ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed (DEEPSPEED), the config for ddp"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16, the config for fp32"),
        # exported by hand, without a launch with FSDP
        ({"FSDP_VERSION": "1"}, ""),
    ],
)
def test_a_config_that_follows_another_strategy_says_so(variables: dict[str, str], said: str) -> None:
    handed = {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", **variables}
    assert differing_settings(read_environment(handed, 2), config_with(strategy={"name": "ddp"})) == said


@cache
def launcher() -> Any:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def passed_on(path: Path) -> dict[str, str]:
    """The variables that accelerate's launcher would pass to its processes for this file. No process starts."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given = ["--config_file", str(path), "--main_process_port", "0", "train.py"]
    arguments, defaults, _ = _validate_launch_command(launcher().parse_args(given))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return {**prepare_deepspeed_cmd_env(arguments)[1], "WORLD_SIZE": "2"}
    return {**prepare_multi_gpu_env(arguments), "WORLD_SIZE": "2"}


def some(**choices: Any) -> Any:
    """A mapping with any of the keys, each with one of its values."""
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in choices.items()})


BOOLS = (True, False, "true", "false")
FSDP_FILES = st.builds(
    # cpu_ram_efficient_loading is true by default, and without sync_module_states accelerate rejects it
    lambda inner, more, sizes: {
        **fsdp(fsdp_cpu_ram_efficient_loading=False, **inner),
        **more,
        **({"parallelism_config": sizes} if sizes else {}),
    },
    some(
        fsdp_version=(1, 2, "2"),
        fsdp_reshard_after_forward=(*BOOLS, "FULL_SHARD"),
        fsdp_offload_params=BOOLS,
        fsdp_forward_prefetch=BOOLS,
        fsdp_use_orig_params=BOOLS,
        fsdp_sync_module_states=BOOLS,
        fsdp_activation_checkpointing=BOOLS,
        fsdp_activation_checkpointing_offload=BOOLS,
        fsdp_auto_wrap_policy=("TRANSFORMER_BASED_WRAP", "NO_WRAP", "SIZE_BASED_WRAP"),
        fsdp_transformer_layer_cls_to_wrap=("Block", "Block,Head"),
        fsdp_state_dict_type=("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
        fsdp_backward_prefetch=("BACKWARD_PRE", "BACKWARD_POST"),
        fsdp_sharding_strategy=("FULL_SHARD", "HYBRID_SHARD", 1),
    ),
    some(mixed_precision=("no", "bf16", "fp16"), enable_cpu_affinity=(True, False)),
    some(
        parallelism_config_dp_replicate_size=(1, 2),
        parallelism_config_dp_shard_size=(1, 2),
        parallelism_config_tp_size=(1, 2),
        parallelism_config_cp_size=(1, 2),
    ),
)
DEEPSPEED_FILES = st.builds(
    lambda inner, more: {**deepspeed(**inner), **more},
    some(
        zero_stage=(0, 1, 2, 3),
        gradient_accumulation_steps=(1, 2, "auto"),
        gradient_clipping=(0, 0.5, 1.0, "auto"),
        offload_optimizer_device=("none", "cpu", "nvme"),
        offload_param_device=("none", "cpu"),
        zero3_init_flag=(True, False),
        zero3_save_16bit_model=(True, False),
        deepspeed_moe_layer_cls_names=("Experts",),
    ),
    some(mixed_precision=("no", "bf16", "fp16")),
)
DDP_FILES = some(
    mixed_precision=("no", "bf16", "fp16"),
    dynamo_config=(
        {"dynamo_backend": "INDUCTOR"},
        {"backend": "EAGER", "use_dynamic": True},
        {"dynamo_mode": "max-autotune"},
    ),
)


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install disttrain[accelerate]",
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(more=st.one_of(DDP_FILES, FSDP_FILES, DEEPSPEED_FILES))
def test_a_file_and_its_launch_agree(more: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, **more)
    said: list[Any] = []
    for settings_read in (read_file(path), read_environment(passed_on(path), 2)):
        try:
            translated = translate(settings_read, config_with())
        except ConfigProblemsError as error:
            said.append(sorted((problem.key, problem.fix) for problem in error.problems))
        else:
            said.append((translated.to_dict(), dict(translated.sources)))
    assert said[0] == said[1]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`disttrain check` in a process that cannot import torch."""
    code = "import sys; sys.modules['torch'] = None; from disttrain.cli import main; main()"
    command = [sys.executable, "-c", code, "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=PROJECT)


@pytest.mark.parametrize("path", sorted((PROJECT / "configs" / "accelerate").iterdir()), ids=lambda path: path.stem)
def test_check_shows_each_of_the_projects_files_without_torch(path: Path) -> None:
    done = check("configs/quickstart.yaml", "strategy.name=accelerate", "--accelerate", str(path))
    assert done.returncode == 0, done.stderr
    name = {"ddp": "ddp", "fsdp": "fsdp", "multi_node": "fsdp"}.get(path.stem, "deepspeed")
    assert f"  name: {name}  # accelerate: distributed_type\n" in done.stdout
    assert "  compute: fp32  # accelerate: mixed_precision\n" in done.stdout


def test_check_rejects_all_at_once_for_people_and_programs(tmp_path: Path) -> None:
    path = written(tmp_path, mixed_precision="bf16", **fsdp(fsdp_version=1, fsdp_use_orig_params=False))
    done = check("configs/quickstart.yaml", "strategy.name=accelerate", "--accelerate", str(path), "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert (found["ok"], sorted(problem["key"] for problem in found["problems"])) == (
        False,
        ["fsdp_config.fsdp_use_orig_params", "fsdp_config.fsdp_version", "mixed_precision"],
    )
    done = check("configs/quickstart.yaml", "--accelerate", str(path))
    assert done.returncode == 2 and "add strategy.name=accelerate" in done.stderr


def test_check_says_when_the_translation_happens() -> None:
    done = check("configs/quickstart.yaml", "strategy.name=accelerate")
    assert done.returncode == 0
    assert "  name: accelerate  # override\n" in done.stdout
    assert "--accelerate FILE shows the result" in done.stderr
