"""Plans which modules tensor parallelism shards, and how: patterns of module names with the name of a style.

The names of styles are Hugging Face's (transformers 5, `distributed/tensor_parallel.py`). A model has its plan as
`tp_plan` or `_tp_plan`, and a config may replace it. The plan is checked before any module changes: unknown styles and
patterns are rejected, and sizes that the degree does not divide. A model can check more, such as its heads, in a method
`check_tensor_parallel(degree)`, which raises ConfigError.
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
"""Placements of activations [batch, time, features]: replicated, sharded by features, sharded by time."""


_log = package_logger("strategy")


@dataclass(frozen=True)
class Style:
    """How one module is sharded.

    Attributes:
        weight: the dim of the weight that is sharded, or None where the weight is replicated.
        bias: the same for the bias.
        takes: the placement of the input that the module receives.
        wants: the placement of the input that it computes on.
        gives: the placement of its output.
        partial: whether each rank uses the parameters for a part of the input, so that gradients are added up.
        head: whether the output may stay sharded over the vocabulary.
        as_head: the style of an embedding that receives vectors instead of ids.
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
    """Return the style of each module to shard, by name, in the model's order. Local; reads only shapes.

    Raises ConfigError with the module's name where a module cannot be sharded into `degree` parts.
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
            _log.info("tensor: %s stays replicated, because its vocabulary is not a multiple of %d", name, degree)
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
            "Cannot compute the loss on logits that are sharded over the vocabulary (strategy.fsdp.tensor.loss=true).",
            "the plan has no head that is sharded like this",
            "plan the head as colwise_gather_output, or leave loss out",
        )
    return {name: replace(style, head=options.loss and name in heads) for name, style in styles.items()}


def _match(model: nn.Module, options: TensorOptions) -> dict[str, str]:
    """Return the style's name for each module that a pattern matches. Later patterns win."""
    plan: Mapping[str, str] | None = options.plan
    if plan is None:
        plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not isinstance(plan, Mapping) or not plan:
        _reject(
            "Cannot use mesh.tensor without a plan.",
            f"there is no tp_plan on {type(model).__qualname__}, and no strategy.fsdp.tensor.plan",
            "write a plan, such as {'layers.*.up': colwise, 'layers.*.down': rowwise}",
        )
    names = {name: module for name, module in model.named_modules() if name}
    words: dict[str, str] = {}
    for pattern, word in plan.items():
        found = [name for name in names if fnmatchcase(name, pattern)]
        # A model's plan may name modules that this variant of the model lacks.
        if not found and options.plan is not None:
            inner = any(fnmatchcase(name, pattern) for name, _ in model.named_parameters())
            what = "only parameters, which are sharded with their module" if inner else "no module"
            known = ", ".join(list(names)[:12])
            _reject(
                "Cannot apply strategy.fsdp.tensor.plan.", f"{pattern!r} matches {what}", f"name modules: {known}, ..."
            )
        if found and word not in WORDS:
            _reject(
                f"Cannot apply the tensor plan to {pattern!r}.", f"no style is named {word!r}", suggest(word, WORDS)
            )
        for name in found:
            # transformers 4 uses "rowwise" for token embeddings too
            is_table = isinstance(names[name], nn.Embedding) and word == "rowwise"
            words[name] = "embedding_rowwise" if is_table else word
    return words


def _fit(name: str, module: nn.Module, word: str, degree: int) -> Style:
    """Return the style named `word` for a module, after a check of the module's class and sizes."""
    weight = getattr(module, "weight", None)
    if word in LINEAR and not isinstance(module, nn.Linear):
        problem = f"it is a {type(module).__qualname__}"
        _reject(f"Cannot shard {name!r} as {word!r}, the tensor plan's style.", problem, "name an nn.Linear")
    if word in TABLE and (weight is None or weight.dim() != 2):
        _reject(
            f"Cannot shard {name!r} as {word!r}, the tensor plan's style.",
            f"it is a {type(module).__qualname__} without a weight [vocab, width]",
            "name an nn.Embedding",
        )
    style = WORDS[word]
    if style.weight is not None and weight is not None and weight.shape[style.weight] % degree:
        _reject(
            f"Cannot shard {name!r} ({word}) over mesh.tensor={degree}.",
            f"its weight is {tuple(weight.shape)}, whose dim {style.weight} is not a multiple of {degree}",
            "choose a degree that divides it, or a plan without this module",
        )
    return style


def _is_odd_vocabulary(name: str, module: nn.Module, word: str, options: TensorOptions, degree: int) -> bool:
    """Whether a model's plan shards an embedding or head whose vocabulary the degree does not divide, as is common.

    It then stays replicated, unless the config's options need it sharded.
    """
    asked = options.plan is not None or options.sequence or options.loss
    if asked or not (word in TABLE or _is_head(name, module, word)):
        return False
    weight, dim = getattr(module, "weight", None), WORDS[word].weight
    return weight is not None and dim is not None and weight.dim() > dim and bool(weight.shape[dim] % degree)


def _check_heads(config: Any, name: str, module: nn.Module, word: str, degree: int) -> None:
    """Reject a degree that would split heads: Hugging Face's attention computes complete heads on each rank."""
    heads = getattr(config, "num_attention_heads", None)
    if word != "colwise" or not isinstance(heads, int) or not name.endswith(("q_proj", "k_proj", "v_proj")):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    count = int(getattr(module, "out_features", 0)) // width
    if count % degree:
        _reject(
            f"Cannot shard {name!r} over mesh.tensor={degree}, which must divide the attention heads.",
            f"{name!r} has {count} head(s)",
            "choose a degree that divides all heads, also those of keys and values",
        )


def _along_time(styles: Mapping[str, Style], words: Mapping[str, str]) -> dict[str, Style]:
    """Return the plan with activations between sharded layers sharded along time, from the embedding to the head."""
    if SEQUENCE not in words.values() or not any(word.startswith("embedding") for word in words.values()):
        _reject(
            "Cannot shard activations along time (strategy.fsdp.tensor.sequence=true) between embedding and head.",
            "the plan has no embedding_rowwise embedding, or no sequence_parallel norm",
            "plan the embedding, every norm and dropout of the residual stream, and the head; or leave sequence out",
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
    """Whether a module may return logits: a gathered Linear outside numbered blocks, or an embedding used as head."""
    if word in TABLE:
        return WORDS[word].weight == 0 and not isinstance(module, nn.Embedding)
    return WORDS[word] is _GATHERED and not any(part.isdigit() for part in name.split("."))


def _reject(failure: str, problem: str, fix: str) -> NoReturn:
    raise ConfigError(explain(failure, problem, fix))
