"""What of a model tensor parallel cuts, and how: name patterns and style words, read and checked before a cut is made.

The words are Hugging Face's (transformers 5, `distributed/tensor_parallel.py`). A model brings its plan as `tp_plan` or
`_tp_plan`; a config may bring another. Refuses words and names that it does not know, and sizes that do not divide.
A model with more to say (heads) has `check_tensor_parallel(degree)`, which raises ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

from disttrain.config.problems import suggest
from disttrain.config.strategy_options import TensorOptions
from disttrain.errors import ConfigError, explain
from disttrain.logs import package_logger

WHOLE, FEATURES, TIME = Replicate(), Shard(-1), Shard(1)
"""Layouts of activations [batch, time, features]: on every rank, cut by features, cut by time."""


_log = package_logger("strategy")


@dataclass(frozen=True)
class Style:
    """How one module is cut. `weight` and `bias` are the dims cut over ranks, None where each rank holds it whole.

    The module is given an input in the layout `takes`, computes on `wants`, and its output leaves as `gives`.
    `partial`: each rank's use of the parameters is its own part of it, so that their gradients are to be added up.
    `head`: the output may stay cut over the vocabulary. `as_head`: the style of a table that is given vectors, not ids.
    """

    weight: int | None = None
    bias: int | None = None
    takes: Placement = WHOLE
    wants: Placement = WHOLE
    gives: Placement = WHOLE
    partial: bool = False
    head: bool = False
    as_head: Style | None = None


_COLWISE = Style(weight=0, bias=0, gives=FEATURES)
_GATHERED = Style(weight=0, bias=0)
_ROWWISE = Style(weight=1, takes=FEATURES, wants=FEATURES)
_SPLIT = Style(weight=1, wants=FEATURES)
LINEAR = {
    "colwise": _COLWISE,
    "colwise_rep": _GATHERED,
    "colwise_gather_output": _GATHERED,
    "rowwise": _ROWWISE,
    "rowwise_rep": _SPLIT,
    "rowwise_split_input": _SPLIT,
}
TABLE = {"embedding_rowwise": Style(weight=0, as_head=_GATHERED), "embedding_colwise": Style(weight=1)}
SEQUENCE = "sequence_parallel"
OTHER = {
    SEQUENCE: Style(takes=TIME, wants=TIME, gives=TIME),
    "replicated_with_grad_allreduce": Style(partial=True),
    "replicate": Style(),
}
WORDS = {**LINEAR, **TABLE, **OTHER}


def plan_modules(model: nn.Module, options: TensorOptions, degree: int) -> dict[str, Style]:
    """The style of each module to cut, by name, in the model's order. Local; looks at shapes alone.

    Raises ConfigError, with the module's name, for what cannot be cut into `degree` parts.
    """
    check = getattr(model, "check_tensor_parallel", None)
    if check is not None:
        check(degree)
    modules = dict(model.named_modules())
    words = _match(model, options)
    styles = {}
    for name, module in modules.items():
        if name not in words or words[name] == "replicate":
            continue
        if _is_odd_vocabulary(name, module, words[name], options, degree):
            _log.info("tensor: %s stays whole: its vocabulary is not a multiple of %d", name, degree)
        else:
            styles[name] = _fit(name, module, words[name], degree)
            _check_heads(getattr(model, "config", None), name, module, words[name], degree)
    if options.sequence:
        styles = _along_time(styles, words)
    else:
        styles = {name: style for name, style in styles.items() if words[name] != SEQUENCE}
    heads = [name for name, style in styles.items() if _is_head(name, modules[name], words[name])]
    if options.loss and not heads:
        _reject(
            "strategy.fsdp.tensor.loss=true leaves the head's output cut over the vocabulary.",
            "no head in the plan that is cut so",
            "plan the head as colwise_gather_output, or leave loss out",
        )
    return {name: replace(style, head=options.loss and name in heads) for name, style in styles.items()}


def _match(model: nn.Module, options: TensorOptions) -> dict[str, str]:
    """The word of each module that a pattern matches; later patterns win."""
    plan: Mapping[str, str] | None = options.plan
    if plan is None:
        plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not isinstance(plan, Mapping) or not plan:
        _reject(
            "mesh.tensor cuts layers as a plan says.",
            f"no tp_plan on {type(model).__qualname__}, and no strategy.fsdp.tensor.plan",
            "write a plan, such as {'layers.*.up': colwise, 'layers.*.down': rowwise}",
        )
    names = {name: module for name, module in model.named_modules() if name}
    words: dict[str, str] = {}
    for pattern, word in plan.items():
        found = [name for name in names if fnmatchcase(name, pattern)]
        # A model's own plan may speak of parts that this variant of it lacks.
        if not found and options.plan is not None:
            inner = any(fnmatchcase(name, pattern) for name, _ in model.named_parameters())
            what = "single parameters, which are cut with their module" if inner else "no module"
            known = ", ".join(list(names)[:12])
            _reject(f"strategy.fsdp.tensor.plan names {pattern!r}.", what, f"name modules: {known}, ...")
        if found and word not in WORDS:
            _reject(f"The tensor plan says {word!r} of {pattern!r}.", "no style of that name", suggest(word, WORDS))
        for name in found:
            # "rowwise" is transformers 4's word for a table of tokens too
            is_table = isinstance(names[name], nn.Embedding) and word == "rowwise"
            words[name] = "embedding_rowwise" if is_table else word
    return words


def _fit(name: str, module: nn.Module, word: str, degree: int) -> Style:
    """The style of a module under a word, checked against the module's kind and sizes."""
    weight = getattr(module, "weight", None)
    if word in LINEAR and not isinstance(module, nn.Linear):
        _reject(f"The tensor plan says {word!r} of {name!r}.", f"a {type(module).__qualname__}", "name an nn.Linear")
    if word in TABLE and (weight is None or weight.dim() != 2):
        _reject(
            f"The tensor plan says {word!r} of {name!r}.",
            f"a {type(module).__qualname__} without a table [vocab, width] as its weight",
            "name an nn.Embedding",
        )
    style = WORDS[word]
    if style.weight is not None and weight is not None and weight.shape[style.weight] % degree:
        _reject(
            f"mesh.tensor={degree} cuts {name!r} ({word}).",
            f"a weight {tuple(weight.shape)}, whose dim {style.weight} is not a multiple of {degree}",
            "choose a degree that divides it, or a plan without this module",
        )
    return style


def _is_odd_vocabulary(name: str, module: nn.Module, word: str, options: TensorOptions, degree: int) -> bool:
    """Whether a model's own plan cuts a table or a head whose vocabulary does not divide: most do not. It may stay
    whole, unless what was asked for needs it cut."""
    asked = options.plan is not None or options.sequence or options.loss
    if asked or not (word in TABLE or _is_head(name, module, word)):
        return False
    weight, dim = getattr(module, "weight", None), WORDS[word].weight
    return weight is not None and dim is not None and weight.dim() > dim and bool(weight.shape[dim] % degree)


def _check_heads(config: Any, name: str, module: nn.Module, word: str, degree: int) -> None:
    """Hugging Face's attentions compute whole heads: a rank has whole heads, of keys and values too."""
    heads = getattr(config, "num_attention_heads", None)
    if word != "colwise" or not isinstance(heads, int) or not name.endswith(("q_proj", "k_proj", "v_proj")):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    count = int(getattr(module, "out_features", 0)) // width
    if count % degree:
        _reject(
            f"mesh.tensor={degree} gives each rank its share of whole attention heads.",
            f"{count} head(s) in {name!r}",
            "choose a degree that divides the heads, those of keys and values too",
        )


def _along_time(styles: Mapping[str, Style], words: Mapping[str, str]) -> dict[str, Style]:
    """The same plan with everything between the cut layers cut along time, from the embedding to the head."""
    if SEQUENCE not in words.values() or not any(word.startswith("embedding") for word in words.values()):
        _reject(
            "strategy.fsdp.tensor.sequence=true cuts along time what is between a table of tokens and the head.",
            "a plan without an embedding_rowwise table, or without a sequence_parallel norm",
            "plan the table, every norm and dropout of the residual stream, and the head; or leave sequence out",
        )
    found = {}
    for name, style in styles.items():
        word = words[name]
        if word.startswith("colwise"):
            style = replace(style, takes=TIME)
        elif word.startswith(("rowwise", "embedding")):
            as_head = style.as_head and replace(style.as_head, takes=TIME)
            style = replace(style, gives=TIME, as_head=as_head)
        found[name] = style
    return found


def _is_head(name: str, module: nn.Module, word: str) -> bool:
    """Whether logits may come out of it: a gathered Linear outside the numbered blocks, or a table read both ways."""
    if word in TABLE:
        return WORDS[word].weight == 0 and not isinstance(module, nn.Embedding)
    return WORDS[word] is _GATHERED and not any(part.isdigit() for part in name.split("."))


def _reject(asked: str, found: str, do: str) -> NoReturn:
    raise ConfigError(explain(asked, found, do))
