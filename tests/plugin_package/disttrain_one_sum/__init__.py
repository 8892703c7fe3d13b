"""The options and entry point of `one_sum`. Imports no torch, because `disttrain check` imports this module."""

from pydantic import Field

from disttrain.config import StrategyEntry, StrategyOptions


class OneSumOptions(StrategyOptions):
    """`bucket_mb` limits how much is added up at once, and so the size of the additional copy."""

    bucket_mb: float = Field(25.0, gt=0)


ENTRY = StrategyEntry("one_sum", OneSumOptions, "disttrain_one_sum.strategy:OneSum")
