"""The contract suite that every strategy must pass, for authors of plug-ins, too. Needs pytest.

`class TestMine(StrategyContract): overrides = ["strategy.name=mine"]` in a test file is all that an author writes.
Names are imported on first use, because the ranks that a test starts need no pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.parity.plain_loop import plain_loop as plain_loop
    from disttrain.testing.cases import EVERY as EVERY
    from disttrain.testing.cases import Case as Case
    from disttrain.testing.cases import sample as sample
    from disttrain.testing.contract import StrategyContract as StrategyContract
    from disttrain.testing.verdict import Verdict as Verdict
    from disttrain.testing.world import WorldError as WorldError
    from disttrain.testing.world import run_world as run_world

_HOMES = {
    "disttrain.testing.cases": ("EVERY", "Case", "sample"),
    "disttrain.testing.contract": ("StrategyContract",),
    "disttrain.parity.plain_loop": ("plain_loop",),
    "disttrain.testing.verdict": ("Verdict",),
    "disttrain.testing.world": ("WorldError", "run_world"),
}
__all__ = ["EVERY", "Case", "StrategyContract", "Verdict", "WorldError", "plain_loop", "run_world", "sample"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
