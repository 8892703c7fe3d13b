"""`gpt` compared with the decoder written out plainly, and with properties of a causal decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_gpt import PlainGPT
from torch import Tensor

from disttrain.errors import ConfigError, DataError
from disttrain.model import GPT
from disttrain.model.gpt import rotate

TINY: dict[str, Any] = {"vocab": 11, "context": 8, "layers": 2, "heads": 4, "width": 16}
SIZES = [
    TINY,
    {**TINY, "layers": 1, "heads": 1},
    {**TINY, "layers": 3, "kv_heads": 2},
    {**TINY, "kv_heads": 1},
    {**TINY, "heads": 8, "kv_heads": 4, "hidden": 10},
    {**TINY, "vocab": 300, "context": 21, "heads": 3, "width": 30, "rope_base": 50.0},
]


class PlainUntied(PlainGPT):
    """The plain decoder with a separate head over its last normalized vectors."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        self.normed = super().norm(x, name)
        return self.normed

    def forward(self, tokens: Tensor) -> Tensor:
        super().forward(tokens)
        return self.normed @ self.value("head.weight").T


def shaken(**sizes: Any) -> GPT:
    """In float64, with all parameters, also norms, far from their initial values, so that no zero or one hides an
    error.
    """
    torch.manual_seed(1)
    model = GPT(**sizes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 0.5)
    return model


def random_tokens(model: GPT, batch: int = 3, time: int | None = None, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(model.tokens.weight), (batch, time or model.context), generator=generator)


def assert_equals_plain(model: GPT, plain: PlainGPT) -> None:
    tokens = random_tokens(model)
    pull = torch.randn(*tokens.shape, len(model.tokens.weight), dtype=torch.float64)
    logits, expected = model(tokens), plain(tokens)
    (logits * pull).sum().backward()
    (expected * pull).sum().backward()
    # Sums of several hundred float64 products in another order: 1e-16 each, times a thousand for three layers.
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        gradient = plain.value(name).grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-11 * float(gradient.abs().max()))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_and_gradients_are_those_of_the_plain_decoder(sizes: dict[str, Any]) -> None:
    model = shaken(**sizes)
    plain = PlainGPT(
        model.state_dict(),
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes.get("kv_heads", sizes["heads"]),
        base=sizes.get("rope_base", 10000.0),
    )
    assert_equals_plain(model, plain)


def test_an_untied_head_reads_the_same_vectors_with_its_own_weight() -> None:
    model = shaken(**TINY, tied=False)
    assert_equals_plain(model, PlainUntied(model.state_dict(), layers=2, heads=4, kv_heads=4))
    assert not torch.equal(model.state_dict()["head.weight"], model.state_dict()["tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kv_heads", "hidden"), [(None, None), (2, 24)])
def test_it_has_the_number_of_parameters_that_its_sizes_imply(
    tied: bool, kv_heads: int | None, hidden: int | None
) -> None:
    model = GPT(vocab=13, context=5, layers=3, heads=4, width=40, kv_heads=kv_heads, hidden=hidden, tied=tied)
    d, k = 10, 4 if kv_heads is None else kv_heads
    f = next(n for n in range(64, 1000, 64) if n >= 8 * 40 / 3) if hidden is None else hidden
    block = 40 * (4 + 2 * k) * d + 40 * 40 + 3 * 40 * f + 2 * 40
    assert sum(parameter.numel() for parameter in model.parameters()) == 13 * 40 * (1 if tied else 2) + 3 * block + 40


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_token_changes_only_its_logits_and_later_ones(kv_heads: int) -> None:
    model = shaken(**TINY, kv_heads=kv_heads).float()
    tokens = random_tokens(model)
    before = model(tokens)
    for t in range(model.context):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all()


def test_a_shorter_text_has_the_logits_of_the_longer_texts_start() -> None:
    model = shaken(**TINY)
    tokens = random_tokens(model)
    whole = model(tokens)
    for time in range(1, model.context):
        # float64 sums in the order that the kernel chooses for this length
        torch.testing.assert_close(model(tokens[:, :time]), whole[:, :time], rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 900), st.integers(0, 900), st.integers(0, 100))
def test_rotated_vectors_keep_their_length_and_interact_by_distance_alone(
    seed: int, i: int, j: int, shift: int
) -> None:
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    speed = 10000.0 ** -(torch.arange(3, dtype=torch.float64) / 3)

    def at(x: Tensor, position: int) -> Tensor:
        angle = position * speed
        return rotate(x, torch.stack([angle.cos(), angle.sin()], -1)[None]).flatten()

    # Angles of up to 1000 radians are rounded to 1e-13, and so are their cosines.
    torch.testing.assert_close(at(q, i).norm(), q.norm(), rtol=1e-14, atol=0)
    torch.testing.assert_close(at(q, i) @ at(k, j), at(q, i + shift) @ at(k, j + shift), rtol=0, atol=1e-11)


def test_the_rotary_table_is_cosine_and_sine_of_each_angle_to_float32() -> None:
    table = GPT(**{**TINY, "context": 5000, "width": 24, "heads": 2}).rotary
    for position, pair in [(0, 0), (1, 1), (1000, 3), (4999, 0), (4999, 5)]:
        angle = position * 10000.0 ** (-pair / 6)
        expected = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float32)
        # one rounding to float32, of numbers up to 1
        torch.testing.assert_close(table[position, pair], expected, rtol=0, atol=2.0**-24)


def test_the_first_weights_have_gpt2s_spread_and_norms_are_one() -> None:
    torch.manual_seed(0)
    model = GPT(vocab=500, context=4, layers=3, heads=2, width=64, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(64))
            continue
        spread = 0.02 / math.sqrt(6) if name.endswith(("attention.out.weight", "swiglu.down.weight")) else 0.02
        count = parameter.numel()
        # Five standard errors of a normal sample's mean and deviation.
        assert abs(float(parameter.detach().mean())) < 5 * spread / math.sqrt(count), name
        assert abs(float(parameter.detach().std()) / spread - 1) < 5 / math.sqrt(2 * count), name


def test_dropout_is_active_in_training_only() -> None:
    torch.manual_seed(3)
    model = GPT(**TINY, dropout=0.3)
    sober = GPT(**TINY)
    sober.load_state_dict(model.state_dict())
    tokens = random_tokens(model)
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    third = model(tokens)
    torch.manual_seed(4)
    assert torch.equal(third, model(tokens))
    model.eval()
    assert torch.equal(model(tokens), sober(tokens))


def test_bf16_autocast_stays_near_float32_and_gives_finite_gradients() -> None:
    torch.manual_seed(5)
    model = GPT(vocab=50, context=256, layers=2, heads=4, kv_heads=2, width=32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)  # attention far from uniform, so that positions matter
    tokens = random_tokens(model, time=256)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    # bf16 keeps 8 bits, 0.4 % per rounding. Twenty independent roundings in sequence make four and a half times that.
    assert float(((logits.float() - exact).norm() / exact.norm()).detach()) < 0.02
    logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab": 0}, "vocab=0"),
        ({"context": -1}, "context=-1"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"heads": 0}, "heads=0"),
        ({"width": "16"}, "width='16'"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"width": 18}, "width=18 for heads=4"),
        ({"width": 12}, "width=12 for heads=4"),  # heads of width 3 have no pairs to rotate
        ({"kv_heads": 3}, "heads=4 for kv_heads=3"),
        ({"kv_heads": 8}, "heads=4 for kv_heads=8"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": "0.1"}, "dropout='0.1'"),
        ({"rope_base": 0}, "rope_base=0"),
        ({"rope_base": math.nan}, "rope_base=nan"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_rejected_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"problem: .*{named}"):
        GPT(**{**TINY, **change})


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (torch.zeros(2, 9, dtype=torch.int64), "at most context=8 .*\n.*9 tokens"),
        (torch.zeros(8, dtype=torch.int64), r"shape \(8,\) of type torch.int64"),
        (torch.zeros(2, 8, 1, dtype=torch.int64), r"\(2, 8, 1\)"),
        (torch.zeros(2, 8), "of type torch.float32"),
        (torch.full((2, 8), 11), "ids from 11 to 11 for vocab=11"),
        (torch.full((2, 8), -1), "ids from -1 to -1 for vocab=11"),
    ],
    ids=["too long", "one row", "three dims", "floats", "above the vocabulary", "below it"],
)
def test_invalid_token_inputs_are_rejected(tokens: Tensor, named: str) -> None:
    with pytest.raises(DataError, match=named):
        GPT(**TINY)(tokens)
