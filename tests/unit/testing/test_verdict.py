"""The contract suite can fail: it reports differences from the plain loop with step, tensor and amount."""

from __future__ import annotations

from dataclasses import replace

import torch

from disttrain.testing.cases import EVERY, Case
from disttrain.testing.ranks import Ran
from disttrain.testing.reference import reference
from disttrain.testing.verdict import judge, undetermined

CASE = Case("tied-frozen", "adamw", 1, 0.5)


def perfect() -> Ran:
    """The plain loop's numbers."""
    plain = reference(CASE.model, CASE.optimizer, CASE.clip, CASE.precision)
    first, last = ({name: value.numpy().copy() for name, value in one.items()} for one in (plain.first, plain.last))
    return Ran(list(plain.losses), list(plain.norms), first, last)


def test_the_plain_loop_itself_passes() -> None:
    assert CASE in EVERY
    assert judge(CASE, [perfect(), perfect()]).faults == []


def test_differences_are_reported() -> None:
    loss, norm, first, last = perfect(), perfect(), perfect(), perfect()
    loss.losses[6] *= 1 + 3e-5
    assert "step 7: loss" in judge(CASE, [loss]).faults[0]
    norm.norms[2] = None
    assert "step 3: gradient norm None" in judge(CASE, [norm]).faults[0]
    first.first["head.bias"][0] += 1e-7
    assert judge(CASE, [first]).faults == ["head.bias does not start with the constructor's values, bit for bit"]
    last.last["head.bias"] *= 1 + 2e-4
    assert "head.bias is 2.0e-04 apart" in judge(CASE, [last]).faults[0]
    other = replace(perfect(), losses=[value + 1e-9 for value in perfect().losses])
    assert judge(CASE, [perfect(), other]).faults == ["rank 1 reports different losses or norms than rank 0"]


def test_only_a_key_bias_is_undetermined() -> None:
    width = 8
    expected = torch.zeros(3 * width, dtype=torch.bool)
    expected[width : 2 * width] = True  # queries, keys, values
    out = {name: undetermined(CASE, name) for name in perfect().last}
    found = {name: mask for name, mask in out.items() if mask is not None}
    assert list(found) == [f"layers.{number}.self_attn.in_proj_bias" for number in (0, 1)]
    assert all(torch.equal(mask, expected) for mask in found.values())
