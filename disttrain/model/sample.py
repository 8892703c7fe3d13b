"""Text from a language model, one token at a time. Enters: cli (`disttrain sample`).

Owns the draw of a token. Refuses temperatures below zero and an empty prompt. Keeps no cache of keys and values: the
window is read anew for each token, so any model of tokens [b, t] to logits [b, t, v] will do, also where they come as
`logits` of its output or as the first of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError, TrainingError, explain


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_tokens: Sequence[int] | Tensor,
    *,
    length: int,
    context: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> list[int]:
    """The `length` tokens that follow the prompt (without it); each sees at most the last `context` tokens.

    Temperature 0 takes the likeliest token. Draws are made on the CPU in float32, from `generator` (a CPU one), so that
    equal logits give equal text on every device. The model's mode is put back afterwards. Local; raises ConfigError,
    and TrainingError for a model without logits, or with logits that are not numbers.
    """
    tokens = [int(token) for token in _flat(prompt_tokens)]
    _check(tokens, length, context, temperature, top_k)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    start, modes = len(tokens), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for _ in range(length):
            window = torch.tensor([tokens[-context:]], dtype=torch.int64, device=device)
            logits_v = logits_of(model(window))[0, -1].float().cpu()
            tokens.append(draw(logits_v, generator, temperature=temperature, top_k=top_k))
    finally:
        for module, training in modes:
            module.training = training
    return tokens[start:]


def draw(logits_v: Tensor, generator: torch.Generator | None, *, temperature: float, top_k: int | None) -> int:
    """One token from logits over the vocabulary; among the `top_k` likeliest where that is given.

    A logit of -inf is a token ruled out. Raises TrainingError for nan and inf.
    """
    if not logits_v.max().isfinite():
        raise TrainingError(
            explain("A token is drawn from finite logits.", f"a largest of {logits_v.max()}", "sample an earlier state")
        )
    if temperature == 0.0:
        return int(logits_v.argmax())
    kept_k, tokens_k = logits_v.topk(min(top_k or len(logits_v), len(logits_v)))
    # The largest is 0 before the division: a temperature near zero then makes -inf of the others, never inf - inf.
    chosen = torch.multinomial(torch.softmax((kept_k - kept_k[0]) / temperature, dim=-1), 1, generator=generator)
    return int(tokens_k[chosen])


def logits_of(output: Any) -> Tensor:
    """Logits [b, t, v] of a model's output: itself, its `logits`, or the first of several. Raises TrainingError."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.dim() == 3:
        return output
    shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
    raise TrainingError(
        explain(
            "Text is drawn from a model of tokens [b, t] to logits [b, t, v].",
            f"a {type(output).__qualname__}{shape}",
            "sample a language model",
        )
    )


def _flat(tokens: Sequence[int] | Tensor) -> Iterable[int]:
    return tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else tokens


def _check(tokens: list[int], length: int, context: int, temperature: float, top_k: int | None) -> None:
    if not tokens:
        raise ConfigError(explain("Sampling starts from a prompt.", "an empty one", "give at least one token"))
    for name, value, least in (
        ("length", length, 0),
        ("context", context, 1),
        ("temperature", temperature, 0.0),
        ("top_k", 1 if top_k is None else top_k, 1),
    ):
        if not value >= least:
            raise ConfigError(explain(f"{name} is to be at least {least}.", f"{value}", f"raise {name}"))
