"""Finds a model's blocks: its large repeated modules, each of which is sharded, recomputed or compiled separately."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from disttrain.errors import ConfigError, explain


def choose_blocks(
    model: nn.Module, wanted: Sequence[str] | None, key: str = "strategy.fsdp.blocks"
) -> list[tuple[str, nn.Module]]:
    """Return name and module of each block. Local.

    Args:
        model: the model, before it is sharded.
        wanted: class names or patterns of module names, or None. None selects children of a ModuleList or Sequential
            that share their class with another child, have parameters, and share none with the rest of the model.
        key: the key of the config that holds `wanted`, for messages.

    Raises ConfigError where an entry of `wanted` matches no module.
    """
    named = [
        (name, module) for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    if wanted is not None:
        chosen = [
            (name, module)
            for name, module in named
            if any(type(module).__name__ == want or fnmatchcase(name, want) for want in wanted)
        ]
        classes = ", ".join(sorted({type(module).__name__ for _, module in named}))
        for want in wanted:
            if not any(type(module).__name__ == want or fnmatchcase(name, want) for name, module in chosen):
                raise ConfigError(
                    explain(
                        f"Cannot find the blocks that {key} names.",
                        f"no module has the class or name {want!r}; classes with parameters: {classes or 'none'}",
                        "name one of these classes or a pattern such as 'layers.*', or leave the key out",
                    )
                )
        return _outermost_last(chosen)
    return _outermost_last(_repeated(model))


def _repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(_parameter_ids(module))
    chosen: list[tuple[str, nn.Module]] = []
    for prefix, parent in model.named_modules():
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        if any(prefix.startswith(f"{name}.") for name, _ in chosen):
            continue
        classes = Counter(type(child) for child in parent.children())
        for key, child in parent.named_children():
            own: Counter[int] = Counter()
            for module in child.modules():
                own.update(_parameter_ids(module))
            private = all(uses[key_] == count for key_, count in own.items())
            # A single layer gains nothing from a separate group, so a block contains modules.
            if classes[type(child)] > 1 and own and private and any(True for _ in child.children()):
                chosen.append((f"{prefix}.{key}" if prefix else key, child))
    return chosen


def _parameter_ids(module: nn.Module) -> Iterator[int]:
    """The ids of the parameters that a module itself holds, once per name."""
    return (id(parameter) for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False))


def _outermost_last(chosen: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Sort blocks so that an inner block is wrapped before the block around it."""
    return sorted(chosen, key=lambda pair: -pair[0].count("."))
