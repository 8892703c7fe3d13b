"""Generates tokens from a language model, one at a time (`disttrain sample`).

No keys or values are cached: the model reads the window again for each token. Therefore any model that maps tokens
[b, t] to logits [b, t, v] works. Its output may be the logits, an object with `logits`, or a tuple that starts with
them.
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
    """Return the `length` tokens that follow the prompt, without the prompt. Local.

    Tokens are drawn on the CPU in float32, so that equal logits give equal text on every device. The training modes of
    the modules are restored afterwards.

    Args:
        model: maps tokens [b, t] to logits [b, t, v].
        prompt_tokens: at least one token.
        length: the number of tokens to generate.
        context: the number of last tokens that the model reads.
        generator: a CPU generator. None means torch's default generator.
        temperature: 0 always selects the most likely token.
        top_k: if set, only the `top_k` most likely tokens are drawn.

    Raises:
        ConfigError: the prompt is empty or an argument is out of range.
        TrainingError: the model returns no logits, or logits that are not finite.
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
    """Return one token drawn from logits [v], among the `top_k` most likely tokens if `top_k` is given.

    A logit of -inf excludes its token. Raises TrainingError for nan and inf.
    """
    if not logits_v.max().isfinite():
        raise TrainingError(
            explain(
                "Cannot draw a token from logits that are not finite.",
                f"the largest logit is {logits_v.max()}",
                "sample from an earlier checkpoint",
            )
        )
    if temperature == 0.0:
        return int(logits_v.argmax())
    kept_k, tokens_k = logits_v.topk(min(top_k or len(logits_v), len(logits_v)))
    # Shift the largest logit to 0 before the division. A temperature near zero then turns the others into -inf, and
    # never computes inf - inf.
    chosen = torch.multinomial(torch.softmax((kept_k - kept_k[0]) / temperature, dim=-1), 1, generator=generator)
    return int(tokens_k[chosen])


def logits_of(output: Any) -> Tensor:
    """Return the logits [b, t, v] in a model's output: the output, its `logits`, or its first element.

    Raises TrainingError if there are no logits of this shape.
    """
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
            "Sampling needs a model that maps tokens [b, t] to logits [b, t, v].",
            f"the model returned a {type(output).__qualname__}{shape}",
            "sample from a language model",
        )
    )


def _flat(tokens: Sequence[int] | Tensor) -> Iterable[int]:
    return tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else tokens


def _check(tokens: list[int], length: int, context: int, temperature: float, top_k: int | None) -> None:
    if not tokens:
        raise ConfigError(explain("Cannot sample without a prompt.", "the prompt is empty", "pass at least one token"))
    for name, value, least in (
        ("length", length, 0),
        ("context", context, 1),
        ("temperature", temperature, 0.0),
        ("top_k", 1 if top_k is None else top_k, 1),
    ):
        if not value >= least:
            raise ConfigError(explain(f"{name} must be at least {least}.", f"{name}={value}", f"raise {name}"))
