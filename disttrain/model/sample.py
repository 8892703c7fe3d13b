"""Text from a language model, one token at a time. Enters: cli (`disttrain sample`).

Owns the draw of a token. Refuses temperatures below zero and an empty prompt. Keeps no cache of keys and values: the
window is read anew for each token, so any model of tokens [b, t] to logits [b, t, v] will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError, explain


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
    equal logits give equal text on every device. The model's mode is put back afterwards. Local; raises ConfigError.
    """
    tokens = [int(token) for token in _flat(prompt_tokens)]
    _check(tokens, length, context, temperature, top_k)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    start, modes = len(tokens), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for _ in range(length):
            window = torch.tensor([tokens[-context:]], dtype=torch.int64, device=device)
            output = model(window)
            logits = output if isinstance(output, Tensor) else output.logits
            tokens.append(draw(logits[0, -1].float().cpu(), generator, temperature=temperature, top_k=top_k))
    finally:
        for module, training in modes:
            module.training = training
    return tokens[start:]


def draw(logits_v: Tensor, generator: torch.Generator | None, *, temperature: float, top_k: int | None) -> int:
    """One token from logits over the vocabulary; among the `top_k` likeliest where that is given."""
    if temperature == 0.0:
        return int(logits_v.argmax())
    kept_k, tokens_k = logits_v.topk(min(top_k or len(logits_v), len(logits_v)))
    chosen = torch.multinomial(torch.softmax(kept_k / temperature, dim=-1), 1, generator=generator)
    return int(tokens_k[chosen])


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
