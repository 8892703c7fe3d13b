"""A rank's way as a digest, and the parameters that a backward reaches against those that it then does reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from disttrain.strategy import zero_order
from disttrain.strategy.reached import reached
from disttrain.strategy.trail import Trail, other_trails

ways = st.lists(st.sampled_from(["a", "b", "blocks.1", "blocks.11"]), max_size=6)


def walked(way: list[str]) -> Trail:
    trail = Trail()
    for name in way:
        trail.note(name)
    return trail


@given(ways, ways)
def test_two_ways_have_one_digest_only_if_they_are_one(first: list[str], second: list[str]) -> None:
    assert (walked(first).digest == walked(second).digest) == (first == second)


def test_it_begins_anew() -> None:
    trail = walked(["a", "b"])
    trail.begin()
    assert (trail.digest, trail.seen) == (walked([]).digest, set())


def test_the_message_names_what_each_alone_went_through() -> None:
    assert "rank 0 alone a, rank 3 alone c, d" in other_trails(["a", "b"], 3, ["b", "c", "d"])
    assert "another order" in other_trails(["a", "b"], 1, ["b", "a"])


def test_the_order_of_calls_is_agreed_on_in_the_first_forwards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(zero_order, "agree_on_way", lambda digest, names: asked.append((digest, names)))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    order = zero_order.CallOrder(model, forwards=2)
    model(torch.ones(2))
    assert not asked, "an evaluation's forward is not watched"
    for forward in range(1, 4):
        with order.watched():
            model(torch.ones(2))
        assert len(asked) == 3 * min(forward, 2)
    end = "the end of the forward"
    assert [names for _, names in asked[:3]] == [["0"], ["0", "2.0"], ["0", "2.0", end]]
    assert asked[:3] == asked[3:] and len({digest for digest, _ in asked[:3]}) == 3
    assert not any(module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied = self.left.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "checkpoint":
            x = checkpoint(self.right, x, use_reentrant=False)
        elif kind == "both":
            x = self.right(self.left(x)) * self.scale
        elif kind == "tied":
            x = x @ self.tied
        return self.frozen(x) * self.scale.detach() if kind != "scale" else x.sum() * self.scale


@given(st.sampled_from(["checkpoint", "both", "tied", "scale"]), st.booleans())
def test_what_a_backward_reaches_is_known_before(kind: str, zero: bool) -> None:
    model = Branches()
    total = model(torch.randn(2, 3), kind).sum()
    total = total * 0.0 if zero else total
    found = reached(total)
    total.backward()
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert names == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
