"""`next_token`, `cross_entropy` and `mse` compared with torch's mean losses over the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from disttrain.errors import ConfigError, TrainingError
from disttrain.objective import MSE, Context, CrossEntropy, Loss, NextToken, Objective

CLASSES = 5
# Sums of a few dozen float64 numbers in another order.
EXACT = {"rtol": 1e-13, "atol": 1e-13}


def at(training: bool = True) -> Context:
    return Context(step=0, training=training, micro_batch=0, make_generator=torch.Generator)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, seed: int = 1, ignored: float = 0.0, ignore_index: int = -100) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = ignore_index
    return targets


class Table(nn.Module):
    """Logits that depend on the token only, with Hugging Face's argument names and output."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.rows = nn.Parameter(randn(CLASSES, CLASSES, seed=9))
        self.form = form
        self.seen: dict[str, Tensor] = {}

    def forward(self, input_ids: Tensor, **others: Tensor) -> Any:
        self.seen = others
        return self.form(self.rows[input_ids])


def totals_of_batch(
    model: Callable[[Any], Any], objective: Any, batch: Any, training: bool = False
) -> tuple[Loss, dict[str, float]]:
    adapter = Objective(objective)
    loss = adapter(model, batch, at(training))
    for term, weight in adapter.weigh(batch).items():
        assert float(weight) == float(loss.weights[term])
    return loss, adapter.summarize(
        loss.sums, {term: total.detach() for term, total in loss.totals.items()}, loss.weights
    )


def mean(loss: Loss) -> Tensor:
    return loss.totals["loss"] / loss.weights["loss"]


# ---------------------------------------------------------------------- next_token


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("mapping", [False, True])
def test_next_token_is_the_mean_over_the_targets_that_count(ignore_index: int, mapping: bool) -> None:
    model = Table()
    inputs, targets = classes(4, 6, seed=3), classes(4, 6, ignored=0.4, ignore_index=ignore_index)
    batch = {"inputs": inputs, "targets": targets} if mapping else [inputs, targets]
    loss, found = totals_of_batch(model, NextToken(ignore_index=ignore_index), batch)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(mean(loss), expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(mean(loss), model.rows), torch.autograd.grad(expected, model.rows), **EXACT
    )
    counts = targets != ignore_index
    assert float(loss.weights["loss"]) == int(counts.sum())
    nats = float(expected.detach())
    assert found["loss"] == pytest.approx(nats, rel=1e-13)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-13)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-13)
    assert found["accuracy"] == int((model(inputs).argmax(-1) == targets)[counts].sum()) / int(counts.sum())


def test_next_token_counts_correct_tokens_in_evaluation_only() -> None:
    batch = classes(2, 3), classes(2, 3)
    assert "accuracy" not in totals_of_batch(Table(), NextToken(), batch, training=True)[1]
    assert "accuracy" in totals_of_batch(Table(), NextToken(), batch, training=False)[1]


def test_bits_per_byte_are_divided_by_a_tokens_bytes_or_omitted() -> None:
    batch = classes(2, 3), classes(2, 3)
    one, four = (totals_of_batch(Table(), NextToken(bytes_per_token=n), batch)[1]["bits_per_byte"] for n in (1.0, 4))
    assert four == pytest.approx(one / 4, rel=1e-15)
    assert "bits_per_byte" not in totals_of_batch(Table(), NextToken(bytes_per_token=None), batch)[1]


def test_hugging_faces_labels_are_the_tokens_and_are_shifted_here() -> None:
    model = Table(lambda logits: SimpleNamespace(logits=logits))
    tokens, labels = classes(3, 6, seed=3), classes(3, 6, seed=3)
    labels[0, 4:] = labels[1, :2] = -100
    mask = torch.ones(3, 6)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask, "length": 3}
    loss, _ = totals_of_batch(model, NextToken(), batch)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(3):
        for t in range(5):
            if labels[row, t + 1] != -100:
                total = total - model.rows[tokens[row, t]].log_softmax(-1)[labels[row, t + 1]]
                count += 1
    torch.testing.assert_close(loss.totals["loss"], total, **EXACT)
    assert float(loss.weights["loss"]) == count == 12
    assert model.seen == {"attention_mask": mask}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["pair", "hugging face", "hugging face, one token"])
def test_a_batch_without_targets_has_no_weight_and_no_gradient(form: str, training: bool) -> None:
    model, nothing = Table(), torch.full((2, 3), -100)
    batch: Any = (classes(2, 3), nothing)
    if form != "pair":
        batch = {"input_ids": classes(2, 3), "labels": nothing}
    if form == "hugging face, one token":
        batch = {"input_ids": classes(2, 1), "labels": classes(2, 1)}
    loss, found = totals_of_batch(model, NextToken(), batch, training)
    loss.totals["loss"].backward()
    assert float(loss.weights["loss"]) == float(loss.totals["loss"].detach()) == 0.0
    assert model.rows.grad is not None
    assert not model.rows.grad.any()
    assert found.keys() == {"loss"}
    assert math.isnan(found["loss"])


@pytest.mark.parametrize(
    ("nats", "perplexity"), [(0.0, 1.0), (699.0, math.exp(699)), (701.0, math.inf), (math.nan, math.nan)]
)
def test_perplexity_is_the_exponential_even_if_infinite(nats: float, perplexity: float) -> None:
    sums = {"total/loss": torch.tensor(nats * 2, dtype=torch.float64), "weight/loss": torch.tensor(2.0)}
    assert NextToken().summarize(sums)["perplexity"] == pytest.approx(perplexity, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_evaluated_in_float32(dtype: torch.dtype) -> None:
    logits, targets = randn(4, 6, CLASSES).to(dtype), classes(4, 6)
    total = totals_of_batch(lambda _: logits, NextToken(), (targets, targets))[0].totals["loss"]
    assert torch.equal(total, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"))
    total = totals_of_batch(lambda _: logits[:, 0], CrossEntropy(), (targets, targets[:, 0]))[0].totals["loss"]
    assert torch.equal(total, F.cross_entropy(logits[:, 0].float(), targets[:, 0], reduction="sum"))
    total = totals_of_batch(lambda _: logits, MSE(), (targets, logits.double()))[0].totals["loss"]
    assert total.dtype == torch.float32
    assert float(total) == 0.0


# ---------------------------------------------------------------------- cross_entropy and mse


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy_is_torchs_mean_over_the_batch(
    shape: tuple[int, ...], smoothing: float, ignore_index: int
) -> None:
    logits = randn(shape[0], CLASSES, *shape[1:])
    logits[:, 2] += 1.0  # the ignored class is often the likeliest, and still does not count
    logits.requires_grad_()
    targets = classes(*shape, ignored=0.3, ignore_index=ignore_index)
    objective = CrossEntropy(ignore_index=ignore_index, label_smoothing=smoothing)
    loss, found = totals_of_batch(lambda _: logits, objective, (targets, targets.int()))
    expected = nn.CrossEntropyLoss(ignore_index=ignore_index, label_smoothing=smoothing)(logits, targets)
    torch.testing.assert_close(mean(loss), expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(mean(loss), logits), torch.autograd.grad(expected, logits), **EXACT)
    counts = targets != ignore_index
    assert found["accuracy"] == int((logits.argmax(1) == targets)[counts].sum()) / int(counts.sum())


@pytest.mark.parametrize("shape", [(7,), (4, 3)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_probabilities_are_targets_too(shape: tuple[int, ...], smoothing: float) -> None:
    logits = randn(shape[0], CLASSES, *shape[1:])
    targets = randn(shape[0], CLASSES, *shape[1:], seed=4).softmax(1)
    loss, found = totals_of_batch(lambda _: logits, CrossEntropy(label_smoothing=smoothing), (targets, targets))
    torch.testing.assert_close(mean(loss), nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, targets), **EXACT)
    assert float(loss.weights["loss"]) == math.prod(shape)
    assert found["accuracy"] == float((logits.argmax(1) == targets.argmax(1)).double().mean())


def test_inputs_in_a_mapping_are_passed_to_the_model_by_name() -> None:
    def model(image: Tensor, scale: Tensor) -> Tensor:
        return image * scale

    image, targets = randn(6, CLASSES), classes(6)
    batch = {"inputs": {"image": image, "scale": torch.tensor(2.0)}, "targets": targets}
    torch.testing.assert_close(
        mean(totals_of_batch(model, CrossEntropy(), batch)[0]), F.cross_entropy(image * 2, targets), **EXACT
    )


@pytest.mark.parametrize("form", ["logits", "mapping", "attribute", "first of several"])
def test_predictions_are_read_from_the_usual_outputs_of_models(form: str) -> None:
    logits, targets = randn(6, CLASSES), classes(6)
    output = {
        "logits": logits,
        "mapping": {"hidden": None, "logits": logits},
        "attribute": SimpleNamespace(logits=logits),
        "first of several": (logits, None),
    }[form]
    assert torch.equal(
        totals_of_batch(lambda _: output, CrossEntropy(), (targets, targets))[0].totals["loss"],
        F.cross_entropy(logits, targets, reduction="sum"),
    )


@pytest.mark.parametrize("shape", [(7,), (4, 1), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_mse_is_torchs_mean_over_all_elements(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    outputs, targets = randn(*shape).requires_grad_(), (randn(*shape, seed=2) * 3).to(dtype)
    loss, found = totals_of_batch(lambda _: outputs, MSE(), (targets, targets))
    expected = nn.MSELoss()(outputs, targets.double())
    torch.testing.assert_close(mean(loss), expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(mean(loss), outputs), torch.autograd.grad(expected, outputs), **EXACT
    )
    assert found["rmse"] == pytest.approx(math.sqrt(float(expected.detach())), rel=1e-13)


def test_without_targets_there_is_no_accuracy_and_no_rmse() -> None:
    nothing = torch.full((3,), -100)
    assert totals_of_batch(lambda _: randn(3, CLASSES), CrossEntropy(), (nothing, nothing))[1].keys() == {"loss"}
    assert totals_of_batch(lambda _: randn(0, 2), MSE(), (nothing, randn(0, 2)))[1].keys() == {"loss"}


# ---------------------------------------------------------------------- sums


def added(losses: list[Loss]) -> dict[str, float]:
    found: dict[str, float] = {}
    for loss in losses:
        for kind in ("totals", "weights", "sums"):
            for name, value in getattr(loss, kind).items():
                found[f"{kind}/{name}"] = found.get(f"{kind}/{name}", 0.0) + (
                    float(value.detach()) if isinstance(value, Tensor) else value
                )
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.data(), st.sampled_from(["next_token", "hugging face", "cross_entropy", "soft", "mse"]))
def test_the_sums_of_two_parts_equal_those_of_the_complete_batch(items: int, data: st.DataObject, kind: str) -> None:
    seed, cut = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, items - 1))
    ignored = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    targets = classes(items, 4, seed=seed, ignored=ignored)
    tokens = classes(items, 4, seed=seed + 1)
    values = randn(items, CLASSES, seed=seed)
    objective, model, batch = {
        "next_token": (NextToken(), Table(), {"inputs": tokens, "targets": targets}),
        "hugging face": (NextToken(), Table(), {"input_ids": tokens, "labels": targets}),
        "cross_entropy": (CrossEntropy(), lambda x: x, {"inputs": values, "targets": targets[:, 0]}),
        "soft": (CrossEntropy(), lambda x: x, {"inputs": values, "targets": values.softmax(1)}),
        "mse": (MSE(), lambda x: x, {"inputs": values, "targets": randn(items, CLASSES, seed=seed + 2)}),
    }[kind]
    adapter = Objective(objective)
    parts = [{key: value[place] for key, value in batch.items()} for place in (slice(cut), slice(cut, None))]
    together = added([adapter(model, part, at(training=False)) for part in parts])
    # float64 sums of a few dozen numbers, in another order
    assert together == pytest.approx(added([adapter(model, batch, at(training=False))]), rel=1e-12, abs=1e-12)


# ---------------------------------------------------------------------- rejected batches and arguments


@pytest.mark.parametrize(
    ("objective", "output", "batch", "named"),
    [
        (
            NextToken(),
            randn(2, 3, 5),
            classes(2, 3),
            r"next_token needs batches .*'labels'.\n  problem: a tensor of type int64",
        ),
        (NextToken(), randn(2, 3, 5), {"input_ids": classes(2, 3)}, "'labels'.\n  problem: a mapping with 'input_ids'"),
        (NextToken(), randn(2, 3, 5), (classes(2, 3),) * 3, "problem: a tuple of 3: Tensor, Tensor, Tensor"),
        (NextToken(), randn(2, 5), (classes(2, 3),) * 2, r"logits \(2, 5\) for targets \(2, 3\)"),
        (NextToken(), randn(2, 3, 5), (classes(2, 3), randn(2, 3)), r"targets \(2, 3\) of torch.float64"),
        (NextToken(), None, (classes(2, 3),) * 2, "floating-point tensor.*\n  problem: the model returned None"),
        (NextToken(), classes(2, 3, 5), (classes(2, 3),) * 2, "problem: the model returned a tensor of type int64"),
        (NextToken(), {"hidden": randn(2)}, (classes(2, 3),) * 2, "problem: the model returned a dict"),
        (CrossEntropy(), randn(3), (classes(3),) * 2, r"logits \(3,\) for targets \(3,\) of torch.int64"),
        (CrossEntropy(), randn(3, 5), (classes(3, 1),) * 2, r"logits \(3, 5\) for targets \(3, 1\)"),
        (CrossEntropy(), randn(3, 5), (classes(3), classes(3).double()), r"targets \(3,\) of torch.float64"),
        (
            CrossEntropy(),
            randn(3, 5),
            (classes(3), [1, 2, 3]),
            "where targets is a tensor.\n  problem: targets: a list of 3: int",
        ),
        (
            CrossEntropy(),
            randn(3, 5),
            {"image": randn(3)},
            "cross_entropy needs batches .*\n  problem: a mapping with 'image'",
        ),
        (MSE(), randn(3, 1), (randn(3),) * 2, r"outputs \(3, 1\) and targets \(3,\)"),
        (MSE(), randn(3), None, "mse needs batches .*\n  problem: None"),
    ],
)
def test_batches_and_outputs_of_another_form_are_rejected(objective: Any, output: Any, batch: Any, named: str) -> None:
    adapter = Objective(objective)
    with pytest.raises(TrainingError, match=named):
        adapter.weigh(batch)
        adapter(lambda *args, **names: output, batch, at())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: CrossEntropy(label_smoothing=1.5), "label_smoothing .*\n  problem: 1.5"),
        (lambda: CrossEntropy(label_smoothing="0.1"), "problem: '0.1'"),
        (lambda: NextToken(bytes_per_token=0), "bytes_per_token .*\n  problem: 0"),
        (lambda: NextToken(bytes_per_token="4"), "problem: '4'"),
    ],
)
def test_nonsensical_arguments_are_rejected(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
