"""Tensor plans: the style of each module, and rejections by name, from shapes only."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.config.schema import PrecisionConfig
from disttrain.config.strategy_options import FSDPOptions, TensorOptions
from disttrain.errors import ConfigError
from disttrain.model import GPT
from disttrain.runtime import Device, MeshSizes
from disttrain.strategy.fsdp.strategy import FSDP
from disttrain.strategy.fsdp.tensor_plan import FEATURES, TIME, WHOLE, WORDS, plan_modules

SIZES: dict[str, Any] = {"vocab": 12, "context": 8, "layers": 2, "heads": 4, "kv_heads": 2, "width": 16, "hidden": 24}


def gpt(**changes: Any) -> GPT:
    with torch.device("meta"):
        return GPT(**{**SIZES, **changes})


class Pair(nn.Module):
    """Two layers and a table, without a plan."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 4)
        self.mix = nn.Conv1d(4, 4, 1)


def test_every_matrix_of_gpt_is_sharded_and_no_norm() -> None:
    model = gpt(tied=False)
    styles = plan_modules(model, TensorOptions(), 2)
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
    assert set(styles) == matrices
    for name, style in styles.items():
        narrows = name.endswith((".out", ".down"))
        assert style.weight == (1 if narrows else 0), name
        assert style.takes == (FEATURES if narrows else WHOLE), name


def test_with_sequence_sharding_gpt_is_sharded_from_the_table_to_the_head() -> None:
    styles = plan_modules(gpt(tied=False, dropout=0.1), TensorOptions(sequence=True), 2)
    assert styles["tokens"].gives == TIME and styles["blocks.1.attention.out"].gives == TIME
    assert styles["blocks.0.attention.q"].takes == TIME and styles["blocks.0.attention.q"].gives == FEATURES
    assert styles["norm"].takes == styles["norm"].gives == styles["blocks.0.swiglu_norm"].wants == TIME
    assert styles["head"].takes == TIME and styles["head"].gives == WHOLE
    assert {"dropout", "blocks.0.dropout"} <= set(styles)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_head_may_stay_sharded(tied: bool) -> None:
    styles = plan_modules(gpt(tied=tied), TensorOptions(loss=True), 2)
    assert [name for name, style in styles.items() if style.head] == (["tokens"] if tied else ["tokens", "head"])


def test_a_users_plan_replaces_the_models_and_later_patterns_win() -> None:
    plan = {"blocks.*.swiglu.*": "colwise", "blocks.*.down": "rowwise", "blocks.1.*": "replicate"}
    styles = plan_modules(gpt(), TensorOptions(plan=plan), 2)
    assert {name: style.weight for name, style in styles.items()} == {
        "blocks.0.swiglu.gate": 0,
        "blocks.0.swiglu.up": 0,
        "blocks.0.swiglu.down": 1,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_an_odd_vocabulary_stays_replicated_by_default(tied: bool) -> None:
    odd = gpt(vocab=11, tied=tied)
    assert not {"tokens", "head"} & set(plan_modules(odd, TensorOptions(), 2))
    for asked in (TensorOptions(sequence=True), TensorOptions(loss=True), TensorOptions(plan=odd.tp_plan)):
        with pytest.raises(ConfigError, match="'tokens'"):
            plan_modules(odd, asked, 2)


def test_transformers_4_called_a_table_rowwise() -> None:
    assert plan_modules(Pair(), TensorOptions(plan={"table": "rowwise"}), 2)["table"].weight == 0


REFUSED = [
    ({"up": "colwize"}, {}, 2, ["'colwize'", "colwise"]),
    ({"upp": "colwise"}, {}, 2, ["'upp'", "no module", "up"]),
    ({"up.weight": "colwise"}, {}, 2, ["'up.weight'", "sharded with their module"]),
    ({"mix": "colwise"}, {}, 2, ["'mix'", "Conv1d"]),
    ({"mix": "embedding_rowwise"}, {}, 2, ["'mix'", "nn.Embedding"]),
    ({"up": "colwise"}, {}, 4, ["'up'", "(6, 4)", "not a multiple of 4"]),
    ({"table": "embedding_rowwise"}, {}, 4, ["'table'", "(10, 4)", "mesh.tensor=4"]),
    (None, {}, 2, ["no tp_plan on Pair", "strategy.fsdp.tensor.plan"]),
    ({"up": "colwise", "down": "rowwise"}, {"sequence": True}, 2, ["sequence=true", "no embedding_rowwise"]),
    ({"up": "colwise", "down": "rowwise"}, {"loss": True}, 2, ["loss=true", "no head"]),
]


@pytest.mark.parametrize(("plan", "options", "degree", "told"), REFUSED)
def test_unsupported_plans_are_rejected_by_name(plan: Any, options: Any, degree: int, told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_modules(Pair(), TensorOptions(plan=plan, **options), degree)
    assert all(part in str(caught.value) for part in told), str(caught.value)


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(4, 2, 4), (4, 4, 3), (6, 3, 2)])
def test_gpts_heads_are_never_split(heads: int, kv_heads: int, degree: int) -> None:
    with pytest.raises(ConfigError, match=f"heads={heads}, kv_heads={kv_heads}"):
        plan_modules(gpt(heads=heads, kv_heads=kv_heads, width=12 * heads), TensorOptions(), degree)


def test_a_model_with_init_weights_is_inspected_before_any_group_and_no_other_is_built() -> None:
    sizes = MeshSizes(replicate=1, shard=1, tensor=3)
    with pytest.raises(ConfigError, match=r"mesh\.tensor=3"):
        FSDP.check_model(FSDPOptions(), sizes, partial(GPT, **SIZES))
    FSDP.check_model(FSDPOptions(), sizes, lambda: pytest.fail("was built"))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("reshard", "shard", "tensor", "told"),
    [(3, 4, 1, ["reshard=3", "mesh.shard=4", "2, 4"]), (2, 1, 1, ["no number here"]), (2, 2, 2, ["mesh.tensor=2"])],
)
def test_groups_that_do_not_fit_the_mesh_are_rejected(reshard: int, shard: int, tensor: int, told: list[str]) -> None:
    sizes = MeshSizes(replicate=1, shard=shard, tensor=tensor)
    with pytest.raises(ConfigError) as caught:
        FSDP.check(
            FSDPOptions(reshard=reshard),
            sizes,
            Device(torch.device("cpu"), "gloo", 1),
            PrecisionConfig.model_validate({}),
        )
    assert all(part in str(caught.value) for part in told)


def test_the_style_names_are_those_of_transformers_5() -> None:
    # distributed/tensor_parallel.py of transformers 5.24.0, without experts, packed weights and MLA
    assert {"colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep"} <= set(WORDS)
    assert {"rowwise_split_input", "embedding_rowwise", "embedding_colwise", "sequence_parallel"} <= set(WORDS)
    assert {"replicated_with_grad_allreduce", "replicate"} <= set(WORDS)
