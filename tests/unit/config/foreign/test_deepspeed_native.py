"""The native DeepSpeed JSON: contradictions to the config, and keys that DeepSpeed would ignore, are rejected."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from disttrain.config import load_config
from disttrain.config.foreign.deepspeed_keys import ELSEWHERE, PLAIN, REMOVED, SECTIONS
from disttrain.config.foreign.deepspeed_native import CLIP_DEFAULT, clip_left_out, ranks_of
from disttrain.config.problems import ConfigProblemsError

CONFIGS = Path(__file__).parents[4] / "configs"


def config(native: Any, folder: Path | None = None, **sections: Any) -> Any:
    """A config that trains with deepspeed, with `sections` merged into it."""
    values: dict[str, Any] = {
        "run": {"steps": 1},
        "model": {"target": "mlp", "args": {"inputs": 2, "hidden": [2], "outputs": 2}},
        "data": {
            "train": {"target": "byte_text", "args": {"source": "python-stdlib", "split": "train", "context": 8}},
            "global_batch": 32,
            "micro_batch": 4,
        },
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.1}},
        "strategy": {"name": "deepspeed", "deepspeed": {"native": native}},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    values["strategy"]["deepspeed"].setdefault("native", native)
    return load_config(values, folder=folder)


def problems(native: Any, folder: Path | None = None, **sections: Any) -> dict[str, str]:
    """Maps keys under `native` (empty for the JSON itself) to the text of the problem."""
    with pytest.raises(ConfigProblemsError) as caught:
        config(native, folder, **sections)
    prefix = "strategy.deepspeed.native"
    return {one.key.removeprefix(prefix).lstrip("."): f"{one.problem}; {one.fix}" for one in caught.value.problems}


def test_a_consistent_json_passes_and_is_in_the_resolved_config(tmp_path: Path) -> None:
    agreeing = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1, "betas": "auto"}},
        "fp16": {"enabled": False, "loss_scale_window": 1000},
        "bf16": {"enabled": "auto"},
        "tensorboard": {"enabled": False},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "reduce_bucket_size": 500},
    }
    (tmp_path / "ds.json").write_text(json.dumps(agreeing))
    found = config("ds.json", tmp_path, optim={"clip_norm": 0.5})
    assert found.strategy.deepspeed.native == agreeing
    again = load_config(found.to_dict())  # as a run's folder is read, which does not depend on the JSON's location
    assert again.strategy.deepspeed.native == agreeing
    assert ranks_of(agreeing) == 4


def test_every_contradiction_is_reported_at_once() -> None:
    told = problems(
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 3,
            "gradient_clipping": CLIP_DEFAULT,
            "communication_data_type": "bf16",
            "prescale_gradients": True,
            "fp16": {"enabled": True},
            "optimizer": {"type": "SGD", "params": {"lr": 0.2}},
            "scheduler": {"type": "WarmupLR"},
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True},
        }
    )
    assert set(told) == {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("communication_data_type", "prescale_gradients", "fp16.enabled", "optimizer.type", "optimizer.params.lr"),
        *("scheduler", "zero_optimization.stage", "zero_optimization.offload_optimizer.device"),
        "zero_optimization.round_robin_gradients",
    }
    assert "gradient_clipping = 1.0, but optim.clip_norm is 0.0" in told["gradient_clipping"]
    assert "train_batch_size = 64, but data.global_batch is 32" in told["train_batch_size"]
    assert "optim.args.lr is 0.1" in told["optimizer.params.lr"]


@pytest.mark.parametrize(
    ("native", "precision", "key"),
    [
        ({"bf16": {"enabled": False}}, {"compute": "bf16"}, "bf16.enabled"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, {"compute": "bf16"}, "bf16.bf16_master_weights_and_grads"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}, "torch_autocast.dtype"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, {"compute": "fp16"}, "fp16.loss_scale"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, {}, "zero_optimization.zenflow"),
    ],
)
def test_precision_and_settings_that_checkpoints_depend_on(native: Any, precision: Any, key: str) -> None:
    assert set(problems(native, precision=precision)) == {key}


def test_stated_buckets_and_those_of_the_json_must_be_equal() -> None:
    native = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    options = {"name": "deepspeed", "deepspeed": {"bucket_mb": 10, "native": native}}
    assert "2621440" in problems(native, strategy=options)["zero_optimization.reduce_bucket_size"]
    native["zero_optimization"]["reduce_bucket_size"] = 2621440
    assert config(native, strategy=options).strategy.deepspeed.bucket_mb == 10


@pytest.mark.parametrize(
    ("native", "key", "says"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping", "did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com", "did you mean 'overlap_comm'"),
        ({"bf16": {"enable": True}}, "bf16.enable", "did you mean 'enabled'"),
        ({"elasticity": {"enabled": True}}, "elasticity", "has removed"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing", "memory.recompute"),
        ({"zero_optimization": True}, "zero_optimization", "write an object"),
    ],
)
def test_keys_that_would_be_ignored(native: Any, key: str, says: str) -> None:
    assert says in problems(native)[key]


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not JSON"), ("[1]", "not an object"), ('{"bf16": {}, "bf16": {}}', "bf16 twice")]
)
def test_a_file_of_another_format(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    assert says in problems("ds.json", tmp_path)[""]
    assert "cannot be read" in problems("other.json", tmp_path)[""]


def test_another_strategy_ignores_it() -> None:
    native = {"gradient_clipping": 1.0}
    assert config(native, strategy={"name": "ddp", "deepspeed": {"native": native}}).strategy.name == "ddp"
    assert (
        "did you mean"
        in problems({"fp61": {}}, strategy={"name": "ddp", "deepspeed": {"native": {"fp61": {}}}})["fp61"]
    )


def test_a_clip_left_to_deepspeed_is_detected() -> None:
    assert clip_left_out({"bf16": {"enabled": True}}) and clip_left_out({"gradient_clipping": "auto"})
    assert not clip_left_out({"gradient_clipping": 0.0}) and not clip_left_out(None)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters"),
        ({"stage": 1, "offload": "nvme", "nvme_path": "/nvme"}, "offload"),
        ({"stage": 3, "offload": "nvme"}, "nvme_path"),
    ],
)
def test_offloads_that_a_stage_lacks(options: Any, key: str) -> None:
    with pytest.raises(ConfigProblemsError) as caught:
        config(None, strategy={"name": "deepspeed", "deepspeed": options})
    assert [one.key for one in caught.value.problems] == [f"strategy.deepspeed.{key}"]


def test_the_shipped_json_agrees_with_the_shipped_config() -> None:
    found = load_config(CONFIGS / "deepspeed" / "zero2.yaml")
    assert found.strategy.deepspeed.native["zero_optimization"]["reduce_bucket_size"] == 2_000_000


MODELS = {
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": "runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": "runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.leaf_module": "runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig",
    "fp16": "runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "comm.config:CommsLoggerConfig",
}


def test_the_tables_match_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    for section, place in MODELS.items():
        module, _, name = place.partition(":")
        fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
        assert {field.alias or key for key, field in fields.items()} == set(SECTIONS[section]), section
    source = importlib.import_module("deepspeed.runtime.config")
    removed = [*source._REMOVED_TOP_LEVEL_CONFIG_KEYS]
    removed += [f"zero_optimization.{key}" for key in source._REMOVED_ZERO_CONFIG_KEYS]
    assert set(REMOVED) == set(removed)
    constants = importlib.import_module("deepspeed.runtime.constants")
    assert constants.GRADIENT_CLIPPING_DEFAULT == CLIP_DEFAULT
    # every NAME that has a NAME_DEFAULT and is read at the top of the JSON
    tops = ("TRAIN_BATCH_SIZE", "STEPS_PER_PRINT", "GRADIENT_CLIPPING", "PRESCALE_GRADIENTS", "DUMP_STATE", "LOG_LEVEL")
    tops += ("GRADIENT_ALLREDUCE_OP", "DISABLE_ALLGATHER", "MEMORY_BREAKDOWN", "MANAGED_GRADIENT_ACCUMULATION")
    assert {getattr(constants, name) for name in tops} <= {*PLAIN, *SECTIONS, *ELSEWHERE}
