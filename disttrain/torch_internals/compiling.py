"""Compiles with a memory budget, and says whether a C++ compiler exists for torch.compile on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from disttrain.torch_internals.access import choose, private


def missing_for_budget() -> str | None:
    """Return what this torch lacks for `compile_within`, or None. Local; imports torch's compiler, which takes seconds.

    A memory budget has no public alternative.
    """
    name = "torch._functorch.config.activation_memory_budget"
    try:
        private("torch._functorch.config", "activation_memory_budget")
        name = "torch._functorch.config.patch"
        private("torch._functorch.config", "patch")
        name = "torch._inductor.compile_fx.compile_fx"
        private("torch._inductor.compile_fx", "compile_fx")
    except Exception:  # noqa: BLE001 - a renamed or changed private name may raise anything
        return name
    return None


def compile_within(budget: float, graph: Any, inputs: Any, options: Mapping[str, Any]) -> Any:
    """Compile a graph as torch.compile's backend does, with torch's memory budget set for this graph alone.

    Args:
        budget: the fraction of activation memory to keep, greater than 0 and at most 1.
        graph: what torch.compile passes to a backend, with its example `inputs`.
        options: torch.compile's options.
    """
    patch = private("torch._functorch.config", "patch")
    with patch({"activation_memory_budget": budget}):
        return private("torch._inductor.compile_fx", "compile_fx")(graph, inputs, config_patches=dict(options))


def has_cpp_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler on this node. Local; takes seconds."""
    return _cpp_compiler_check()()


@cache
def _cpp_compiler_check() -> Callable[[], bool]:
    def probed() -> Callable[[], bool]:
        find = private("torch._inductor.cpp_builder", "get_cpp_compiler")
        missing: type[Exception] = private("torch._inductor.exc", "InvalidCxxCompiler")

        def function() -> bool:
            try:
                find()
            except missing:
                return False
            return True

        function()
        return function

    return choose("torch._inductor.cpp_builder.get_cpp_compiler", _is_on_path, probed)


def _is_on_path() -> bool:
    from torch.utils.cpp_extension import get_cxx_compiler  # needs setuptools

    name: str = get_cxx_compiler()  # type: ignore[no-untyped-call]
    return shutil.which(name) is not None
