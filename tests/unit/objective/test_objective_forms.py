"""Every supported form of an objective, and the error of every unsupported one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from disttrain.errors import ConfigError, TrainingError
from disttrain.objective import Context, Objective

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([1.0, -1.0, 2.0])
BATCH = (X, Y)
# Computed by hand: predictions are the rows' sums 1, 5, 9; errors 0, 6, 7.
TOTAL, COUNT = 85.0, 3


def model(x: Tensor) -> Tensor:
    return x.sum(1)


def at(step: int = 4, training: bool = True, make_generator: Any = torch.Generator) -> Context:
    return Context(step=step, training=training, micro_batch=1, make_generator=make_generator)


def squares(model: Any, batch: Any) -> tuple[Tensor, int]:
    return (model(batch[0]) - batch[1]).square().sum(), len(batch[1])


def scaled(model: Any, batch: Any, by: float) -> tuple[Tensor, int]:
    total, count = squares(model, batch)
    return total * by, count


class Called:
    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        return squares(model, batch)

    def method(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        return squares(model, batch)


class CalledModule(nn.Module):
    """The old idiom: a criterion kept as `loss`, which is not a method of the objective."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.MSELoss(reduction="sum")
        self.register_buffer("weigh", torch.zeros(1))

    def forward(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        return self.loss(model(batch[0]), batch[1]), len(batch[1])


class Fuller:
    def forward(self, model: Any, batch: Any) -> Tensor:
        return model(batch[0])

    def loss(self, output: Tensor, batch: Any) -> Any:
        return (output - batch[1]).square().sum(), len(batch[1])


class FullerAndCalled(Fuller):
    """Calling it means something else."""

    def __call__(self, question: str) -> str:
        raise AssertionError(question)


class FullerModule(nn.Module):
    def __init__(self, offset: bool = True) -> None:
        super().__init__()
        if offset:
            self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, model: Any, batch: Any) -> Tensor:
        return model(batch[0])

    def loss(self, output: Tensor, batch: Any) -> Any:
        return F.mse_loss(output, batch[1], reduction="sum"), len(batch[1])


class Weighed(Fuller):
    """Its weights come from `weigh`: numbers in the batch, not its length."""

    def weigh(self, batch: Any) -> Any:
        return 5

    def loss(self, output: Tensor, batch: Any) -> Any:
        return super().loss(output, batch)[0]


class Detector(Fuller):
    """Two terms: boxes over the boxes, classes over the images. `loss` returns them in another order than `weigh`."""

    def weigh(self, batch: Any) -> Any:
        return {"boxes": torch.tensor(4), "classes": 3}

    def loss(self, output: Tensor, batch: Any) -> Any:
        return {"classes": output.sum(), "boxes": output.square().sum()}, None, {"found": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    "user",
    [
        squares,
        lambda model, batch: list(squares(model, batch)),
        functools.partial(scaled, by=1.0),
        Called(),
        Called().method,
        CalledModule(),
        Fuller(),
        FullerAndCalled(),
        FullerModule(),
    ],
    ids=lambda user: repr(Objective(user)),
)
def test_each_form_of_one_loss_is_read_as_the_same_sum_and_number(user: Any) -> None:
    objective = Objective(user)
    loss = objective(model, BATCH, at())
    assert {term: float(total.detach()) for term, total in loss.totals.items()} == {"loss": TOTAL}
    assert loss.weights == {"loss": COUNT}
    assert loss.sums == {}
    assert not objective.has_weigh
    assert objective.summarize({}, {"loss": TOTAL}, loss.weights) == {"loss": TOTAL / COUNT}


def test_a_message_names_the_function_inside_a_partial() -> None:
    assert repr(Objective(functools.partial(scaled, by=2.0))) == "Objective(scaled)"


def test_a_modules_hooks_run() -> None:
    user, seen = FullerModule(), []
    user.register_forward_hook(lambda module, args, output: seen.append(output))
    Objective(user)(model, BATCH, at())
    assert len(seen) == 1


def test_only_a_module_with_parameters_or_buffers_is_trained_and_saved() -> None:
    user = FullerModule()
    assert Objective(user).module is user
    assert Objective(CalledModule()).module is not None, "a buffer moves and is saved too"
    assert Objective(FullerModule(offset=False)).module is None
    assert Objective(Fuller()).module is None


def test_with_weigh_its_weights_count_and_a_total_is_enough() -> None:
    objective = Objective(Weighed())
    assert objective.has_weigh
    assert objective.weigh(BATCH) == {"loss": 5.0}
    loss = objective(model, BATCH, at())
    assert ({term: float(total) for term, total in loss.totals.items()}, loss.weights) == (
        {"loss": TOTAL},
        {"loss": 5.0},
    )

    class Both(Weighed):
        def loss(self, output: Tensor, batch: Any) -> Any:
            return Fuller.loss(self, output, batch)

    assert Objective(Both())(model, BATCH, at()).weights == {"loss": 5.0}


def test_each_of_several_terms_has_a_separate_denominator() -> None:
    objective = Objective(Detector())
    loss = objective(model, BATCH, at())
    assert list(loss.totals) == list(loss.weights) == ["boxes", "classes"], "ranks add up by position"
    assert [float(total) for total in loss.totals.values()] == [1 + 25 + 81, 15]
    assert objective.summarize({}, {"boxes": 107.0, "classes": 15.0}, loss.weights) == {
        "loss": 107 / 4 + 15 / 3,
        "loss/boxes": 107 / 4,
        "loss/classes": 15 / 3,
    }


def test_a_term_of_weight_zero_counts_nothing_and_only_such_terms_give_no_number() -> None:
    objective = Objective(Detector())
    found = objective.summarize({}, {"boxes": 0.0, "classes": 15.0}, {"boxes": 0.0, "classes": 3.0})
    assert (found["loss"], found["loss/classes"]) == (5.0, 5.0)
    assert math.isnan(found["loss/boxes"])
    assert math.isnan(objective.summarize({}, {"boxes": 0.0}, {"boxes": 0.0})["loss"])


@pytest.mark.parametrize("couples", [True, False])
def test_an_objective_says_whether_it_couples_items(couples: bool) -> None:
    user = Fuller()
    assert Objective(user).couples_items is False
    user.couples_items = couples  # type: ignore[attr-defined]
    assert Objective(user).couples_items is couples


# ---------------------------------------------------------------------- context


def test_context_is_passed_to_every_function_that_names_it() -> None:
    seen: list[tuple[str, Any]] = []

    class Watching(Fuller):
        def forward(self, model: Any, batch: Any, context: Context) -> Tensor:
            seen.append(("forward", context))
            return super().forward(model, batch)

        def loss(self, output: Tensor, batch: Any, *, context: Context) -> Any:
            seen.append(("loss", context))
            return super().loss(output, batch)

    class WatchingModule(FullerModule):
        def forward(self, model: Any, batch: Any, context: Context) -> Tensor:
            seen.append(("module", context))
            return super().forward(model, batch)

    def plain(model: Any, batch: Any, context: Any = None) -> Any:
        seen.append(("plain", context))
        return squares(model, batch)

    here = at(step=7)
    for user in (Watching(), WatchingModule(), plain):
        Objective(user)(model, BATCH, here)
    assert seen == [("forward", here), ("loss", here), ("module", here), ("plain", here)]


def test_a_contexts_generator_is_made_once_at_its_first_use() -> None:
    made: list[torch.Generator] = []

    def make() -> torch.Generator:
        made.append(torch.Generator().manual_seed(3))
        return made[-1]

    here = at(make_generator=make)
    assert made == []
    draws = [torch.rand(2, generator=here.generator) for _ in range(2)]
    assert len(made) == 1
    assert torch.equal(torch.cat(draws), torch.rand(4, generator=torch.Generator().manual_seed(3)))


# ---------------------------------------------------------------------- sums and summaries


def returning(returned: Any) -> Callable[[Any, Any], Any]:
    return lambda model, batch: returned


def test_sums_become_tensors_without_a_graph() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    sums = {"correct": 2, "ratio": np.float64(0.5), "hits": total * torch.ones(2), 3: torch.tensor(1)}
    loss = Objective(returning((total * 1, 2, sums)))(model, BATCH, at())
    assert {name: value.tolist() for name, value in loss.sums.items()} == {
        "correct": 2.0,
        "ratio": 0.5,
        "hits": [6.0, 6.0],
        "3": 1,
    }
    assert not any(value.requires_grad for value in loss.sums.values())
    assert loss.totals["loss"].requires_grad


@pytest.mark.parametrize("weight", [2, 2.0, True + 1, np.int64(2), np.float32(2), torch.tensor(2), torch.tensor([2.0])])
def test_a_weight_may_be_any_number_and_carries_no_graph(weight: Any) -> None:
    found = Objective(returning((torch.tensor(6.0), weight)))(model, BATCH, at()).weights["loss"]
    assert float(found) == 2.0
    grown = torch.tensor(2.0, requires_grad=True) * 1
    found = Objective(returning((torch.tensor(6.0), grown)))(model, BATCH, at()).weights["loss"]
    assert isinstance(found, Tensor)
    assert (found.shape, found.requires_grad) == ((), False)


def test_without_a_summarize_scalar_sums_are_reported_over_the_one_weight() -> None:
    sums = {"correct": torch.tensor(6.0), "hits": torch.tensor([1.0, 2.0])}
    objective = Objective(squares)
    assert objective.summarize(sums, {"loss": 10.0}, {"loss": 4.0}) == {"loss": 2.5, "correct": 1.5}
    assert math.isnan(objective.summarize(sums, {"loss": 0.0}, {"loss": 0.0})["correct"])
    several = Objective(Detector()).summarize(sums, {"boxes": 1.0, "classes": 1.0}, {"boxes": 2.0, "classes": 4.0})
    assert several["correct"] == 6.0


def test_summarize_reads_the_sums_of_all_ranks_and_adds_to_the_loss() -> None:
    class F1(Detector):
        def summarize(self, sums: Any) -> Any:
            assert sums["total/boxes"].dtype == sums["weight/classes"].dtype == torch.float64
            return {
                "f1": sums["found"][0] / sums["found"][1],
                "boxes_per_image": sums["weight/boxes"] / sums["weight/classes"],
            }

    found = Objective(F1()).summarize(
        {"found": torch.tensor([1.0, 2.0])}, {"boxes": 8.0, "classes": 3.0}, {"boxes": 4, "classes": 3}
    )
    assert found == {
        "loss": 3.0,
        "loss/boxes": 2.0,
        "loss/classes": 1.0,
        "f1": 0.5,
        "boxes_per_image": pytest.approx(4 / 3),
    }


@pytest.mark.parametrize(
    ("summary", "named"),
    [
        (None, "problem: it returned None"),
        ([("f1", 1.0)], "problem: it returned a list of 1: tuple"),
        ({"f1": "high"}, "problem: 'f1' is a str"),
        ({"f1": torch.zeros(2), "ok": 1.0}, r"problem: 'f1' is a tensor of type float32 and shape \(2,\)\n"),
        ({"loss": 1.0}, "problem: 'loss' is already reported"),
    ],
    ids=str,
)
def test_a_summary_without_new_numbers_is_rejected(summary: Any, named: str) -> None:
    user = Fuller()
    user.summarize = lambda sums: summary  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match=f"Fuller: summarize(.|\n)*{named}"):
        Objective(user).summarize({}, {"loss": 1.0}, {"loss": 1.0})


# ---------------------------------------------------------------------- rejected objectives

ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("returned", "found", "do"),
    [
        (ONE, "it returned a loss without a weight", r"reduction='sum'\) and the number of items"),
        (None, "it returned None", "return the sum"),
        (3.0, "it returned float 3.0", "return the sum"),
        ({"loss": ONE}, "it returned a dict", "return the sum"),
        ((ONE,), "it returned a tuple of 1: Tensor", "return the sum"),
        ((ONE, 1, {}, {}), "it returned a tuple of 4: Tensor, int, dict, dict", "return the sum"),
        ((torch.ones(3), 3), r"it is a tensor of type float32 and shape \(3,\)", r"\.sum\(\)"),
        ((torch.ones(1), 3), r"it is a tensor of type float32 and shape \(1,\)", r"\.sum\(\)"),
        ((torch.tensor(3), 3), r"it is a tensor of type int64 and shape \(\)", r"\.sum\(\)"),
        ((3.0, 3), "it is float 3.0", "sum the losses of the items"),
        ((ONE, None), "it is None", "one finite number"),
        ((ONE, math.nan), "it is float nan", "one finite number"),
        ((ONE, math.inf), "it is float inf", "one finite number"),
        ((ONE, -1), "it is int -1", "not negative"),
        ((ONE, "3"), "it is a str", "one finite number"),
        ((ONE, torch.ones(3)), r"it is a tensor of type float32 and shape \(3,\)", "one finite number"),
        ((ONE, {"a": 1}), "it is a dict", "one finite number"),
        (
            ({"a": ONE}, 1),
            "the loss returned the totals .'a'., and there is no weigh",
            "the same names from both, or return one summed total",
        ),
        ((ONE, 1, None), "it is None", "return a mapping"),
        ((ONE, 1, {"correct": "2"}), "it is {'correct': 'a str'}", "return a mapping"),
        ((ONE, 1, [ONE]), "it is a list of 1: Tensor", "return a mapping"),
    ],
    ids=str,
)
def test_a_wrong_return_is_reported_with_the_actual_value_and_the_fix(returned: Any, found: str, do: str) -> None:
    def mine(model: Any, batch: Any) -> Any:
        return returned

    with pytest.raises(TrainingError, match=f"^Objective .*mine(.|\n)*  problem: {found}\n  fix: .*{do}"):
        Objective(mine)(model, BATCH, at())


@pytest.mark.parametrize(
    ("weights", "totals", "found"),
    [
        ({"a": 1, "b": 2}, {"a": ONE}, r"the loss returned the totals \['a'\], and weigh\(batch\) names \['a', 'b'\]"),
        (
            {"a": 1},
            {"a": ONE, "b": ONE},
            r"the loss returned the totals \['a', 'b'\], and weigh\(batch\) names \['a'\]",
        ),
        ({"a": 1, "b": 2}, ONE, r"the loss returned one unnamed total, and weigh\(batch\) names \['a', 'b'\]"),
        (1, {"a": ONE}, r"the loss returned the totals \['a'\], and weigh\(batch\) names no terms"),
        ({"a": 1, "b": 1}, {"a": ONE, "b": torch.ones(2)}, r"it is a tensor of type float32 and shape \(2,\)"),
        ({"a": 1, "b": math.nan}, {"a": ONE, "b": ONE}, "it is float nan"),
        ({"a": 1, "b": -2.0}, {"a": ONE, "b": ONE}, "it is float -2.0"),
        ({}, {}, "it is a dict"),
        (None, ONE, "it is None"),
        (1, (ONE, 1, 2), "it is int 2"),
    ],
    ids=str,
)
def test_terms_that_do_not_fit_their_weights_are_rejected(weights: Any, totals: Any, found: str) -> None:
    class Mine(Fuller):
        def weigh(self, batch: Any) -> Any:
            return weights

        def loss(self, output: Tensor, batch: Any) -> Any:
            return totals

    with pytest.raises(TrainingError, match=f"^Objective .*Mine(.|\n)*  problem: {found}\n  fix: "):
        Objective(Mine())(model, BATCH, at())


class ForwardAlone:
    def forward(self, model: Any, batch: Any) -> Any: ...


class LossOfThree(Fuller):
    def loss(self, output: Tensor, inputs: Tensor, targets: Tensor) -> Any: ...


class WeighsTwo(Fuller):
    def weigh(self, inputs: Tensor, targets: Tensor) -> Any: ...


class SummarizesNothing(Fuller):
    def summarize(self) -> Any: ...


class ModuleOfOne(nn.Module):
    def forward(self, batch: Any) -> Any: ...


@pytest.mark.parametrize(
    ("user", "named"),
    [
        (Fuller, "problem: the class Fuller, not an instance of it\n  fix: pass an instance"),
        ("mse", "problem: a str\n"),
        (None, "problem: a NoneType\n"),
        (ForwardAlone(), "problem: a ForwardAlone\n"),
        (nn.CrossEntropyLoss(), "torch's CrossEntropyLoss accepts neither.*\n.*use cross_entropy"),
        (nn.MSELoss(reduction="sum"), "torch's MSELoss"),
        (F.mse_loss, "torch's mse_loss"),
        (functools.partial(F.cross_entropy, reduction="sum"), "torch's cross_entropy"),
        (
            lambda model, inputs, targets: None,
            r"must accept \(model, batch\)(.|\n)*missing a required argument: 'targets'",
        ),
        (lambda batch: None, "too many positional arguments"),
        (ModuleOfOne(), "ModuleOfOne must accept(.|\n)*too many positional"),
        (LossOfThree(), r"LossOfThree.loss must accept \(output, batch\)(.|\n)*'targets'"),
        (WeighsTwo(), r"WeighsTwo.weigh must accept \(batch\)(.|\n)*'targets'"),
        (SummarizesNothing(), r"SummarizesNothing.summarize must accept \(sums\)"),
    ],
)
def test_objects_that_cannot_be_an_objective_are_rejected_before_any_batch(user: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Objective(user)
