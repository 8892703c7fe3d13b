"""`strategy.name=accelerate`: accelerate's settings become our keys, and unsupported settings are rejected by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate_files import config_with, deepspeed, degrees, from_accelerate, fsdp, rejected, written

from disttrain.config import ConfigProblemsError
from disttrain.config.foreign.accelerate import translate
from disttrain.config.foreign.accelerate_settings import read_file
from disttrain.config.render import source_of

RESHARD = {"strategy.name": "fsdp", "strategy.fsdp.reshard": True, "strategy.fsdp.offload": False}
STAGE = {"strategy.deepspeed.offload": "none", "strategy.deepspeed.offload_parameters": "none"}
FP32 = {"precision.compute": "fp32"}
TRANSLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one process": ({"distributed_type": "NO", "num_processes": 1}, {"strategy.name": "none", **FP32}),
    "one on CPU": ({"distributed_type": "MULTI_CPU", "num_processes": 1}, {"strategy.name": "none", **FP32}),
    "ddp": ({}, {"strategy.name": "ddp", **FP32}),
    "ddp in bf16": ({"mixed_precision": "bf16"}, {"strategy.name": "ddp", "precision.compute": "bf16"}),
    "ddp in fp16": ({"mixed_precision": "fp16"}, {"strategy.name": "ddp", "precision.compute": "fp16"}),
    "no precision named": ({"mixed_precision": None}, {"strategy.name": "ddp", **FP32}),
    "compiled": (
        {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}},
        {"strategy.name": "ddp", "memory.compile": True, **FP32},
    ),
    "an older file's compiler": (
        {"dynamo_backend": "INDUCTOR"},
        {"strategy.name": "ddp", "memory.compile": True, **FP32},
    ),
    "fsdp": (fsdp(), {**RESHARD, **FP32}),
    "fsdp, its version as text": (fsdp(fsdp_version="2"), {**RESHARD, **FP32}),
    "fsdp, keys without their prefix": (
        {"distributed_type": "FSDP", "fsdp_config": {"version": 2, "reshard_after_forward": "false"}},
        {**RESHARD, "strategy.fsdp.reshard": False, **FP32},
    ),
    "fsdp with everything": (
        fsdp(
            fsdp_reshard_after_forward=False,
            fsdp_offload_params=True,
            fsdp_forward_prefetch=True,
            fsdp_activation_checkpointing=True,
            fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            fsdp_transformer_layer_cls_to_wrap="Block, Embedding",
            fsdp_cpu_ram_efficient_loading=True,
            fsdp_state_dict_type="SHARDED_STATE_DICT",
        ),
        {
            "strategy.name": "fsdp",
            "strategy.fsdp.reshard": False,
            "strategy.fsdp.offload": True,
            "strategy.fsdp.prefetch_forward": 1,
            "strategy.fsdp.blocks": ["Block", "Embedding"],
            "memory.recompute": "full",
            **FP32,
        },
    ),
    "fsdp in one piece": (fsdp(fsdp_auto_wrap_policy="NO_WRAP"), {**RESHARD, "strategy.fsdp.blocks": [], **FP32}),
    "fsdp, blocks as the model says": (fsdp(fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP"), {**RESHARD, **FP32}),
    "fsdp, how many the command line says": (
        {**degrees(shard=2), "num_processes": -1},
        {**RESHARD, "mesh.replicate": 1, "mesh.shard": 2, "mesh.tensor": 1, **FP32},
    ),
    "hsdp and tensor parallel": (
        {**degrees(2, 3, 2), "num_processes": 12},
        {**RESHARD, "mesh.replicate": 2, "mesh.shard": 3, "mesh.tensor": 2, **FP32},
    ),
    "ZeRO's default": (deepspeed(), {"strategy.name": "deepspeed", "strategy.deepspeed.stage": 2, **STAGE, **FP32}),
    "ZeRO-3 with everything": (
        deepspeed(
            zero_stage=3,
            offload_optimizer_device="cpu",
            offload_param_device="cpu",
            gradient_clipping=0.5,
            gradient_accumulation_steps=2,
            zero3_init_flag=True,
            zero3_save_16bit_model=False,
            deepspeed_multinode_launcher="standard",
        ),
        {
            "strategy.name": "deepspeed",
            "strategy.deepspeed.stage": 3,
            "strategy.deepspeed.offload": "cpu",
            "strategy.deepspeed.offload_parameters": "cpu",
            "optim.clip_norm": 0.5,
            **FP32,
        },
    ),
    "ZeRO, what is left open": (
        deepspeed(zero_stage=1, gradient_clipping="auto", gradient_accumulation_steps="auto"),
        {"strategy.name": "deepspeed", "strategy.deepspeed.stage": 1, **STAGE, **FP32},
    ),
}


@pytest.mark.parametrize(("more", "expected"), TRANSLATIONS.values(), ids=TRANSLATIONS)
def test_a_file_becomes_config_keys(more: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    translated = translate(read_file(written(tmp_path, **more)), config_with())
    assert from_accelerate(translated) == expected
    assert translated.strategy.options is getattr(translated.strategy, expected["strategy.name"])


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "FSDP1 by default": ({"distributed_type": "FSDP"}, {"fsdp_config.fsdp_version": "1 (accelerate's default)"}),
    "FSDP1 by its words": (
        fsdp(fsdp_version=1, fsdp_reshard_after_forward="FULL_SHARD", fsdp_sharding_strategy="SHARD_GRAD_OP"),
        {
            "fsdp_config.fsdp_version": "fsdp_version: 2",
            "fsdp_config.fsdp_reshard_after_forward": "a value for FSDP1",
            "fsdp_config.fsdp_sharding_strategy": "'SHARD_GRAD_OP'",
        },
    ),
    "FSDP2's odd settings": (
        fsdp(
            fsdp_use_orig_params=False,
            fsdp_sync_module_states=False,
            fsdp_backward_prefetch="BACKWARD_POST",
            fsdp_state_dict_type="FULL_STATE_DICT",
            fsdp_activation_checkpointing_offload=True,
            fsdp_ignored_modules="head",
            fsdp_auto_wrap_policy="SIZE_BASED_WRAP",
        ),
        {
            "fsdp_config.fsdp_use_orig_params": "false",
            "fsdp_config.fsdp_sync_module_states": "false",
            "fsdp_config.fsdp_backward_prefetch": "BACKWARD_POST",
            "fsdp_config.fsdp_state_dict_type": "disttrain.load",
            "fsdp_config.fsdp_activation_checkpointing_offload": "true",
            "fsdp_config.fsdp_ignored_modules": "'head'",
            "fsdp_config.fsdp_auto_wrap_policy": "repeated blocks",
        },
    ),
    "another backend": (
        {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}},
        {
            "distributed_type": "'MEGATRON_LM', which disttrain does not support",
            "megatron_lm_config": "disttrain does not support this section",
        },
    ),
    "a TPU": ({"distributed_type": "XLA"}, {"distributed_type": "MULTI_GPU (ddp)"}),
    "another device": ({"distributed_type": "MULTI_NPU"}, {"distributed_type": "MULTI_GPU (ddp)"}),
    "no type": ({"distributed_type": None}, {"distributed_type": "nothing"}),
    "SageMaker": (
        {"compute_environment": "AMAZON_SAGEMAKER", "ec2_instance_type": "ml.p3"},
        {"compute_environment": "accelerate launch", "ec2_instance_type": "unknown key"},
    ),
    "one process of two": ({"distributed_type": "MULTI_CPU"}, {"num_processes": "accelerate starts one"}),
    "not distributed": ({"distributed_type": "NO"}, {"num_processes": "accelerate starts one"}),
    "processes that do not spread": (
        {"num_processes": 3, "num_machines": 2},
        {"num_processes": "accelerate starts 1 on each machine"},
    ),
    "fp8": (
        {"mixed_precision": "fp8", "fp8_config": {"backend": "TE"}},
        {"mixed_precision": "bf16, fp16 or 'no'", "fp8_config": "mixed_precision: bf16"},
    ),
    "a bare no": ({"mixed_precision": False}, {"mixed_precision": "quote it"}),
    "compilers": (
        {"dynamo_config": {"dynamo_backend": "EAGER", "dynamo_mode": "max-autotune", "dynamo_use_fullgraph": True}},
        {
            "dynamo_config.dynamo_backend": "INDUCTOR or NO",
            "dynamo_config.dynamo_mode": "'max-autotune'",
            "dynamo_config.dynamo_use_fullgraph": "true",
        },
    ),
    "mpirun": ({"mpirun_config": {"mpirun_hostfile": "hosts"}}, {"mpirun_config": "use_cpu: true"}),
    "context parallel": (degrees(shard=2, cp_size=2), {"parallelism_config.parallelism_config_cp_size": "set it to 1"}),
    "degrees of another world": (
        degrees(replicate=2, shard=2),
        {"parallelism_config.parallelism_config_dp_shard_size": "2 x 2 x 1 = 4 is not the world's 2"},
    ),
    "misspelt": (
        {"num_proceses": 2, **fsdp(fsdp_reshard="true")},
        {"num_proceses": "'num_processes'", "fsdp_config.fsdp_reshard": "'fsdp_reshard_after_forward'"},
    ),
    "no truth": (fsdp(fsdp_offload_params="maybe"), {"fsdp_config.fsdp_offload_params": "write true or false"}),
    "no number": ({"num_processes": "two"}, {"num_processes": "write a number"}),
    "ZeRO stage 0": (deepspeed(zero_stage=0), {"deepspeed_config.zero_stage": "MULTI_GPU for ddp"}),
    "ZeRO stage 4": (deepspeed(zero_stage=4), {"deepspeed_config.zero_stage": "not a ZeRO stage"}),
    "ZeRO's odd settings": (
        deepspeed(zero3_save_16bit_model=True, deepspeed_moe_layer_cls_names="Experts"),
        {
            "deepspeed_config.zero3_save_16bit_model": "true",
            "deepspeed_config.deepspeed_moe_layer_cls_names": "'Experts'",
        },
    ),
    "parameters that stage 2 does not cut": (
        deepspeed(zero_stage=2, offload_param_device="cpu"),
        {"deepspeed_config.offload_param_device": "zero_stage: 3"},
    ),
    "MPI under DeepSpeed": (
        deepspeed(deepspeed_multinode_launcher="openmpi"),
        {"deepspeed_config.deepspeed_multinode_launcher": "standard"},
    ),
    "another accumulation": (
        deepspeed(gradient_accumulation_steps=3),
        {"deepspeed_config.gradient_accumulation_steps": "micro-batches of 8 over 2 rank(s) takes 2"},
    ),
    "a disk that nobody names": (
        deepspeed(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/nvme"),
        {"deepspeed_config.offload_param_device": "strategy.deepspeed.nvme_path"},
    ),
    "no such JSON": (
        deepspeed(deepspeed_config_file="nowhere.json"),
        {"deepspeed_config.deepspeed_config_file": "cannot be read"},
    ),
}


@pytest.mark.parametrize(("more", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_unsupported_settings_are_rejected_by_name(
    more: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    problems = {problem.key: str(problem) for problem in rejected(tmp_path, **more).problems}
    for key, said in expected.items():
        assert key in problems and said in problems[key], problems
    # The translated config may then be rejected too, under the keys of disttrain.
    theirs = {key for key in problems if not key.startswith(("strategy.", "data."))}
    assert theirs <= {*expected}
    assert all(str(tmp_path / "accelerate.yaml") in problems[key] for key in theirs)


@pytest.mark.parametrize(
    ("stated", "more", "key"),
    [
        ({"precision": {"compute": "bf16"}}, {}, "mixed_precision"),
        ({"precision": {"compute": "fp32"}}, {"mixed_precision": "bf16"}, "mixed_precision"),
        ({"mesh": {"replicate": 2}}, degrees(shard=2), "parallelism_config.parallelism_config_dp_replicate_size"),
        ({"mesh": {"tensor": 1}}, degrees(tensor=2), "parallelism_config.parallelism_config_tp_size"),
        (
            {"strategy": {"name": "accelerate", "fsdp": {"reshard": False}}},
            fsdp(),
            "fsdp_config.fsdp_reshard_after_forward",
        ),
        (
            {"strategy": {"name": "accelerate", "deepspeed": {"stage": 3}}},
            deepspeed(zero_stage=2),
            "deepspeed_config.zero_stage",
        ),
        (
            {"optim": {"target": "torch.optim.AdamW", "clip_norm": 1.0}},
            deepspeed(gradient_clipping=0.5),
            "deepspeed_config.gradient_clipping",
        ),
    ],
)
def test_settings_that_contradict_the_config_are_rejected(
    stated: dict[str, Any], more: dict[str, Any], key: str, tmp_path: Path
) -> None:
    (problem,) = rejected(tmp_path, config_with(**stated), **more).problems
    assert problem.key == key
    assert " is " in problem.problem and "(argument)" in problem.problem


def test_settings_that_the_config_repeats_are_accepted(tmp_path: Path) -> None:
    config = config_with(
        mesh={"replicate": 1, "shard": -1, "tensor": 1},
        precision={"compute": "fp64"},
        optim={"target": "torch.optim.AdamW", "clip_norm": None},
    )
    translated = translate(read_file(written(tmp_path, **degrees(shard=2))), config)
    assert (translated.mesh.shard, translated.precision.compute) == (2, "fp64")
    config = config_with(optim={"target": "torch.optim.AdamW", "clip_norm": None})
    off = translate(read_file(written(tmp_path, **deepspeed(gradient_clipping=0))), config)
    assert off.optim is not None and off.optim.clip_norm == 0


def test_only_settings_of_accelerate_have_its_name_as_source(tmp_path: Path) -> None:
    config = config_with(strategy={"name": "accelerate", "fsdp": {"prefetch_backward": 2}})
    translated = translate(read_file(written(tmp_path, **fsdp())), config)
    sources = {
        name: source_of(("strategy", "fsdp", name), translated.sources)
        for name in ("reshard", "prefetch_backward", "prefetch_forward", "tensor")
    }
    assert sources == {
        "reshard": "accelerate: fsdp_config.fsdp_reshard_after_forward",
        "prefetch_backward": "argument",
        "prefetch_forward": "argument",  # the mapping's source, given with it
        "tensor": "argument",
    }


def test_faults_of_the_complete_config_are_reported_with_the_rejections(tmp_path: Path) -> None:
    problems = rejected(tmp_path, mixed_precision="bf16", **deepspeed(zero_stage=0)).problems
    assert "deepspeed_config.zero_stage" in {problem.key for problem in problems}


NATIVE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.5,
    "steps_per_print": 10,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "reduce_bucket_size": "auto",
        "sub_group_size": 1000,
    },
}


def test_a_deepspeed_json_becomes_config_keys(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(NATIVE), encoding="utf-8")
    named = deepspeed(deepspeed_config_file=str(tmp_path / "ds.json"), zero3_init_flag=False)
    translated = translate(read_file(written(tmp_path, mixed_precision=None, **named)), config_with())
    options = translated.strategy.deepspeed
    assert (options.stage, options.offload, options.offload_parameters) == (3, "cpu", "none")
    assert translated.optim is not None and translated.optim.clip_norm == 1.5
    assert options.native == {
        "zero_optimization": {"offload_optimizer": {"pin_memory": True}, "sub_group_size": 1000},
    }
    assert translated.sources["strategy.deepspeed.stage"] == "accelerate: deepspeed_config.deepspeed_config_file"


@pytest.mark.parametrize(
    ("inner", "more", "key"),
    [
        ({"zero_optimization": {}}, {}, "deepspeed_config.zero_stage"),
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 3}, "deepspeed_config.zero_stage"),
        ({"train_batch_size": 64}, {"zero_stage": 2}, "deepspeed_config.deepspeed_config_file"),
        ({"train_micro_batch_size_per_gpu": 4}, {"zero_stage": 2}, "deepspeed_config.deepspeed_config_file"),
        ({"gradient_clipping": 0.1}, {"zero_stage": 2, "gradient_clipping": 1.0}, "deepspeed_config.gradient_clipping"),
        ({"gradient_accumulation_steps": 9}, {"zero_stage": 2}, "deepspeed_config.deepspeed_config_file"),
    ],
)
def test_a_deepspeed_json_may_not_contradict(
    inner: dict[str, Any], more: dict[str, Any], key: str, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(inner), encoding="utf-8")
    named = deepspeed(deepspeed_config_file=str(tmp_path / "ds.json"), **more)
    assert [problem.key for problem in rejected(tmp_path, **named).problems] == [key]


def test_the_dtype_in_a_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}), encoding="utf-8")
    named = deepspeed(deepspeed_config_file=str(path))
    problems = rejected(tmp_path, mixed_precision="bf16", **named).problems
    assert "fp16.enabled: true" in next(problem.problem for problem in problems if problem.key == "mixed_precision")


def test_a_file_of_another_format_is_rejected(tmp_path: Path) -> None:
    for text in ("- a\n- b\n", "a: [\n", ""):
        (tmp_path / "accelerate.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigProblemsError):
            read_file(tmp_path / "accelerate.yaml")
    with pytest.raises(ConfigProblemsError, match="cannot be read"):
        read_file(tmp_path / "nowhere.yaml")
