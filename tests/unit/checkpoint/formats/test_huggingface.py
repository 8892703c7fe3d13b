"""Exports load with Hugging Face's `from_pretrained`, and checkpoints of `save_pretrained` import.

Runs if transformers is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import disttrain
from disttrain.engine.export import convert

transformers = pytest.importorskip("transformers")


def llama(tied: bool) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def gpt2() -> Any:
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **tokens))


def loss(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return model(batch, labels=batch).loss * len(batch), len(batch)


def texts() -> torch.Tensor:
    return torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0))


MODELS = {"llama-tied": (llama, {"tied": True}), "llama": (llama, {"tied": False}), "gpt2": (gpt2, {})}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_on_both_sides(name: str, tmp_path: Path) -> None:
    make, args = MODELS[name]
    disttrain.train(
        {
            "run": {"name": "run", "dir": str(tmp_path), "steps": 2, "device": "cpu"},
            "model": {"target": f"{__name__}:{make.__name__}", "args": args},
            "objective": {"target": f"{__name__}:loss"},
            "data": {"train": {"target": f"{__name__}:texts"}, "global_batch": 4},
            "optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.01}},
            "strategy": {"name": "none"},
            "report": {"progress": False, "plot": False},
        }
    )
    tokens = torch.arange(8).unsqueeze(0)
    expected = disttrain.load(tmp_path / "run")(tokens).logits
    assert not torch.equal(expected, make(**args).eval()(tokens).logits)
    assert convert(tmp_path / "run", tmp_path / "out").left_out == ()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(make(**args)).__name__]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(theirs(tokens).logits, expected)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 1
    ours = disttrain.load(tmp_path / "theirs", make_model=lambda: make(**args))
    assert torch.equal(ours(tokens).logits, expected)
    convert(tmp_path / "run", tmp_path / "model.pt")
    plain = make(**args).eval()
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(plain(tokens).logits, expected)
