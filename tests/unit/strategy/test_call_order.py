"""Digests of a rank's call order, and predictions of the parameters that a backward reaches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from disttrain.strategy import call_order
from disttrain.strategy.call_order import CallSequence, explain_other_calls
from disttrain.strategy.deepspeed.reached_parameters import reached

ways = st.lists(st.sampled_from(["a", "b", "blocks.1", "blocks.11"]), max_size=6)


def walked(way: list[str]) -> CallSequence:
    calls = CallSequence()
    for name in way:
        calls.append(name)
    return calls


@given(ways, ways)
def test_two_call_orders_have_one_digest_only_if_they_are_equal(first: list[str], second: list[str]) -> None:
    assert (walked(first).digest == walked(second).digest) == (first == second)


def test_it_restarts_after_each_step() -> None:
    calls = walked(["a", "b"])
    calls.restart()
    assert (calls.digest, calls.names) == (walked([]).digest, set())


def test_the_message_names_the_calls_of_each_rank_alone() -> None:
    assert "only rank 0 calls a, only rank 3 calls c, d" in explain_other_calls(["a", "b"], 3, ["b", "c", "d"])
    assert "another order" in explain_other_calls(["a", "b"], 1, ["b", "a"])


class Chosen(nn.Module):
    """Calls the first of its layers, and the second on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, *, both: bool) -> torch.Tensor:
        return self.second(self.first(x)) if both else self.first(x)


@pytest.mark.parametrize(("begins_with_both", "watched"), [(True, 1), (False, 3)])
def test_calls_are_compared_until_a_forward_calls_all_or_for_long_enough(
    begins_with_both: bool, watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(call_order, "check_same_calls", lambda digest, names: asked.append((digest, names)))
    model = Chosen()
    order = call_order.CallOrderCheck(model.named_children(), forwards=3)
    model(torch.ones(2), both=True)
    assert not asked, "an evaluation's forward is not watched"
    for _ in range(5):
        with order.checked():
            model(torch.ones(2), both=begins_with_both)
    end = "the end of the forward"
    way = [["first"], ["first", "second"]] if begins_with_both else [["first"]]
    way.append([*way[-1], end])
    assert [names for _, names in asked] == way * watched
    assert len({digest for digest, _ in asked}) == len(way)
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
def test_the_parameters_that_a_backward_reaches_are_known_in_advance(kind: str, zero: bool) -> None:
    model = Branches()
    total = model(torch.randn(2, 3), kind).sum()
    total = total * 0.0 if zero else total
    found = reached(total)
    total.backward()
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert names == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
