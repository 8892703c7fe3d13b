"""Generated text compared with loops and distributions written out here."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError, TrainingError
from disttrain.model import GPT, generate
from disttrain.model.sample import draw


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(2)
    model = GPT(vocab=9, context=6, layers=2, heads=2, width=8, dropout=0.5, tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(25.0)  # a distribution so peaked that every token of the window matters
    return model


class Returns(nn.Module):
    """One row of logits for every position, in the requested form."""

    def __init__(self, logits: list[float], form: Any = lambda logits: logits) -> None:
        super().__init__()
        self.row, self.form = torch.tensor(logits), form
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, tokens: Tensor) -> Any:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.form(self.row.expand(*tokens.shape, -1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_temperature_zero_selects_the_likeliest_after_the_last_context_tokens(model: GPT) -> None:
    expected = [3, 1]
    model.eval()
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected[-6:]]))[0, -1].argmax()))
    model.train()
    assert generate(model, [3, 1], length=12, context=6, temperature=0.0) == expected[2:]
    assert generate(model, torch.tensor([[3, 1]]), length=12, context=6, temperature=0.0) == expected[2:]
    assert generate(model, [3, 1], length=12, context=5, temperature=0.0) != expected[2:], "any window would pass"


def test_equal_generators_give_equal_text_and_others_do_not(model: GPT) -> None:
    texts = [generate(model, [0], length=30, context=6, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(8)
    one = generate(model, [0], length=30, context=6)
    torch.manual_seed(8)
    assert generate(model, [0], length=30, context=6) == one


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (3.0, 3), (1.0, 99)])
def test_token_frequencies_match_the_softmax(temperature: float, top_k: int | None) -> None:
    logits = [0.5, -1.0, 2.0, 0.0, -math.inf]
    kept = sorted(range(5), key=lambda token: -logits[token])[:top_k]
    powers = {token: math.exp(logits[token] / temperature) for token in kept}
    tokens = generate(
        Returns(logits), [0], length=3000, context=1, temperature=temperature, top_k=top_k, generator=seeded(3)
    )
    counts = Counter(tokens)
    assert set(counts) <= set(kept) - {4}
    for token, power in powers.items():
        share = power / sum(powers.values())
        # five standard deviations of a binomial count; the seed is fixed
        assert abs(counts[token] - 3000 * share) <= 5 * math.sqrt(3000 * share * (1 - share))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 1), (1e-40, None), (1e-40, 2)])
def test_one_choice_or_a_temperature_near_zero_gives_the_likeliest(temperature: float, top_k: int | None) -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 2.9])
    assert {draw(logits, seeded(seed), temperature=temperature, top_k=top_k) for seed in range(20)} == {1}


def test_it_reads_in_evaluation_mode_and_restores_every_mode(model: GPT) -> None:
    watched = Returns([0.0, 1.0])
    generate(watched, [0], length=2, context=4)
    assert watched.modes == [(False, False)] * 2
    assert torch.is_grad_enabled()
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    generate(model, [0], length=1, context=6)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(Exception, match="vocab"):
        generate(model, [77], length=1, context=6)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: (logits, None),
        lambda logits: {"logits": logits, "cache": None},
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: logits[:, -1:],  # like nanoGPT when it does not train
        lambda logits: logits.bfloat16(),
    ],
    ids=["tuple", "mapping", "object", "last position", "bf16"],
)
def test_logits_are_read_from_the_usual_outputs_of_models(form: Any) -> None:
    assert generate(Returns([0.0, 5.0, 1.0], form), [0, 0], length=3, context=8, temperature=0.0) == [1, 1, 1]


def test_zero_tokens_return_the_prompt_only(model: GPT) -> None:
    assert generate(model, [1], length=0, context=6) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_tokens": []}, "prompt"),
        ({"prompt_tokens": torch.empty(1, 0)}, "prompt"),
        ({"length": -1}, "length must be at least 0.\n  problem: length=-1"),
        ({"context": 0}, "context must be at least 1"),
        ({"temperature": -0.5}, "temperature .*\n  problem: temperature=-0.5"),
        ({"temperature": math.nan}, "temperature .*\n  problem: temperature=nan"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
    ids=str,
)
def test_impossible_sampling_settings_are_rejected(model: GPT, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        generate(model, **{"prompt_tokens": [0], "length": 1, "context": 6, **change})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]], ids=str)
def test_logits_that_are_not_finite_are_rejected(logits: list[float], temperature: float) -> None:
    with pytest.raises(TrainingError, match="logits that are not finite"):
        generate(Returns(logits), [0], length=1, context=1, temperature=temperature)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (lambda logits: {"loss": logits}, "a NoneType"),
        (lambda logits: None, "a NoneType"),
        (lambda logits: logits[:, -1], r"a Tensor of shape \(1, 2\)"),
    ],
)
def test_a_model_without_logits_is_rejected(form: Any, named: str) -> None:
    with pytest.raises(TrainingError, match=f"logits(.|\n)*problem: the model returned {named}"):
        generate(Returns([0.0, 1.0], form), [0], length=1, context=1)
