"""`gpt`: a modern decoder in one file, for reading and for speed.

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202),
tied or untied head. Dropout, where asked for, is on the embedding and on each branch, so that attention keeps its fused
kernels. Refuses shapes that do not fit; owns its initial values by `init_weights`.
Enters: configs (`model.target: gpt`), strategy by way of `disttrain.model.initialize`.

Shapes: b batch, t time, c width, v vocab, h query heads, g key-value heads, d width of a head, f hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from disttrain.errors import ConfigError, DataError, explain
from disttrain.model.initialize import fill_self
from disttrain.runtime.seeds import GeneratorFor


class GPT(nn.Module):
    """Tokens [b, t] of type int64 to logits [b, t, v].

    Built under `torch.manual_seed(s)` it is bit-equal to its shapes filled by `init_weights(generators_for(s))`.
    Raises ConfigError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        kv_heads: int | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
        tied: bool = True,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check_sizes(
            vocab=vocab, context=context, layers=layers, heads=heads, width=width, kv_heads=kv_heads, hidden=hidden
        )
        _check_shares(dropout, rope_base)
        # Two thirds of 4 * width keep the parameters of a two-matrix block (2002.05202); multiples of 64 suit kernels.
        hidden = -(-8 * width // (3 * 64)) * 64 if hidden is None else hidden
        self.context, self.rope_base, self.heads, self.kv_heads = context, rope_base, heads, kv_heads
        self.tokens = TokenTable(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden, dropout) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = None if tied else Linear(width, vocab)
        self.register_buffer("rotary", torch.empty(context, width // heads // 2, 2), persistent=False)
        self.rotary: Tensor
        fill_self(self)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Logits of the next token at each position. Raises DataError for tokens it cannot read."""
        _check_tokens(tokens_bt, self.context)
        rotary_td = self.rotary[: tokens_bt.shape[1]]
        x_btc = self.dropout(self.tokens(tokens_bt))
        for block in self.blocks:
            x_btc = block(x_btc, rotary_td)
        x_btc = self.norm(x_btc)
        logits_btv: Tensor = self.tokens(x_btc, to_logits=True) if self.head is None else self.head(x_btc)
        return logits_btv

    @property
    def tp_plan(self) -> dict[str, str]:
        """How tensor parallel cuts it, in Hugging Face's words: attention by heads, SwiGLU by hidden features, the
        table and the head by vocabulary; what lies between along time where that is asked for."""
        block = {
            "attention_norm": "sequence_parallel",
            "attention.q": "colwise",
            "attention.k": "colwise",
            "attention.v": "colwise",
            "attention.out": "rowwise",
            "swiglu_norm": "sequence_parallel",
            "swiglu.gate": "colwise",
            "swiglu.up": "colwise",
            "swiglu.down": "rowwise",
            "dropout": "sequence_parallel",
        }
        ends = {"tokens": "embedding_rowwise", "dropout": "sequence_parallel", "norm": "sequence_parallel"}
        head = {} if self.head is None else {"head": "colwise_gather_output"}
        return {**ends, **{f"blocks.*.{name}": style for name, style in block.items()}, **head}

    def check_tensor_parallel(self, degree: int) -> None:
        """Raise ConfigError where `degree` ranks cannot each have whole heads of queries, keys and values."""
        if self.heads % degree or self.kv_heads % degree:
            found = f"heads={self.heads}, kv_heads={self.kv_heads}"
            do = "choose a degree that divides both, or other model.args"
            raise ConfigError(explain(f"mesh.tensor={degree} gives each rank its share of gpt's heads.", found, do))

    def init_weights(self, generator_for: GeneratorFor) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name with its whole initial value on the CPU, from shapes alone."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, device="cpu")
                continue
            value = torch.empty(parameter.shape, device="cpu")
            yield name, value.normal_(0.0, _std(name, layers=len(self.blocks)), generator=generator_for(name))
        context, pairs, _ = self.rotary.shape
        yield "rotary", _rotary_table(context, pairs, self.rope_base)


class Block(nn.Module):
    """Two residual branches, each normed at its entrance: attention, then SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.swiglu_norm = RMSNorm(width)
        self.swiglu = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_btc: Tensor, rotary_td: Tensor) -> Tensor:
        x_btc = x_btc + self.dropout(self.attention(self.attention_norm(x_btc), rotary_td))
        y_btc: Tensor = x_btc + self.dropout(self.swiglu(self.swiglu_norm(x_btc)))
        return y_btc


class Attention(nn.Module):
    """Causal attention; `kv_heads` heads of keys and values each serve `heads / kv_heads` heads of queries."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.shared, self.head_width = kv_heads < heads, width // heads
        self.q = Linear(width, width)
        self.k = Linear(width, kv_heads * self.head_width)
        self.v = Linear(width, kv_heads * self.head_width)
        self.out = Linear(width, width)

    def forward(self, x_btc: Tensor, rotary_td: Tensor) -> Tensor:
        # However many heads there are: under tensor parallel a rank has its own alone.
        q, k, v = (part(x_btc).unflatten(-1, (-1, self.head_width)) for part in (self.q, self.k, self.v))
        y_bhtd = F.scaled_dot_product_attention(
            rotate(q, rotary_td).transpose(1, 2),
            rotate(k, rotary_td).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.shared,
        )
        y_btc: Tensor = self.out(y_bhtd.transpose(1, 2).flatten(2))
        return y_btc


class SwiGLU(nn.Module):
    """silu(gate) * up, then down."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x_btc: Tensor) -> Tensor:
        y_btc: Tensor = self.down(F.silu(self.gate(x_btc)) * self.up(x_btc))
        return y_btc


class TokenTable(nn.Module):
    """A vector for each token, read both ways: tokens to vectors, and as a tied head vectors to logits.

    One module with both readings, because sharding wrappers gather a module's weight around its own forward.
    """

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, x: Tensor, to_logits: bool = False) -> Tensor:
        if to_logits:
            return F.linear(x, self.weight)
        try:
            return F.embedding(x, self.weight)
        except IndexError:  # told on the CPU only: a GPU would have to be waited for
            found = f"ids from {int(x.min())} to {int(x.max())} for vocab={self.weight.shape[0]}"
            do = "raise model.args.vocab, or mend the data"
            raise DataError(explain("Token ids are from 0 to below vocab.", found, do)) from None


class Linear(nn.Linear):
    """Without bias, and left as allocated: the model writes every value once, in `init_weights`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: torch's own draw would be overwritten."""


class RMSNorm(nn.Module):
    """Each vector over its root mean square, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


def rotate(x_bthd: Tensor, rotary_td: Tensor) -> Tensor:
    """Turn each pair of neighbouring entries by its position's angle: a complex product, in float32 at least."""
    wide = x_bthd if x_bthd.dtype in (torch.float32, torch.float64) else x_bthd.float()
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    turned = pairs * torch.view_as_complex(rotary_td.to(wide.dtype))[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_bthd.dtype)


def _rotary_table(context: int, pairs: int, base: float) -> Tensor:
    """cos and sin of position * base^(-pair/pairs), [t, d/2, 2]; in float64 first: float32 loses far angles."""
    speed = base ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    angle = torch.arange(context, dtype=torch.float64, device="cpu")[:, None] * speed
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def _std(name: str, *, layers: int) -> float:
    """GPT-2's: 0.02, and what feeds the residual stream over sqrt(2 * layers), so that its variance does not grow."""
    return 0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02


def _check_tokens(tokens_bt: Tensor, context: int) -> None:
    if tokens_bt.dim() != 2 or tokens_bt.dtype not in (torch.int64, torch.int32):
        raise DataError(
            explain(
                "The model reads token ids [batch, time] of type int64.",
                f"{tuple(tokens_bt.shape)} of {tokens_bt.dtype}",
                "let each item of the data be one row of token ids",
            )
        )
    if tokens_bt.shape[1] > context:
        raise DataError(
            explain(
                f"The model reads at most context={context} tokens at a time.",
                f"items of {tokens_bt.shape[1]} tokens",
                "shorten the data's items, or raise model.args.context",
            )
        )


def _check_sizes(*, heads: int, width: int, kv_heads: int, **others: int | None) -> None:
    sizes = {"heads": heads, "width": width, "kv_heads": kv_heads, **others}
    wrong = {n: s for n, s in sizes.items() if s is not None and not (isinstance(s, Integral) and s >= 1)}
    if wrong:
        found = ", ".join(f"{name}={size!r}" for name, size in wrong.items())
        do = "give positive whole numbers"
    elif width % heads or (width // heads) % 2:
        found, do = f"width={width} over heads={heads}", "choose a width that is an even multiple of heads"
    elif heads % kv_heads:
        found, do = f"heads={heads} over kv_heads={kv_heads}", "choose kv_heads that divides heads"
    else:
        return
    raise ConfigError(explain("The sizes of gpt are to fit together.", found, do))


def _check_shares(dropout: float, rope_base: float) -> None:
    if not (isinstance(dropout, int | float) and 0.0 <= dropout < 1.0):
        raise ConfigError(explain("dropout of gpt is a share.", f"dropout={dropout!r}", "choose one from 0 to below 1"))
    if not (isinstance(rope_base, int | float) and 0.0 < rope_base < float("inf")):
        raise ConfigError(
            explain("rope_base of gpt is a positive number.", f"rope_base={rope_base!r}", "choose 10000.0, or larger")
        )
