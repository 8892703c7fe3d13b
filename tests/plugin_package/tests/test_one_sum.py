"""The contract that every strategy of disttrain keeps, on this one."""

from disttrain.testing import StrategyContract


class TestOneSum(StrategyContract):
    overrides = ("strategy.name=one_sum",)
    sizes = (1, 2)


class TestSmallBuckets(StrategyContract):
    overrides = ("strategy.name=one_sum", "strategy.one_sum.bucket_mb=0.001")
    sizes = (3,)
    models = ("gpt", "odd")
    precisions = ("fp32",)
