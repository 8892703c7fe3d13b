"""Runs the contract suite of disttrain on `one_sum`."""

from disttrain.testing import StrategyContract


class TestOneSum(StrategyContract):
    overrides = ("strategy.name=one_sum", "strategy.one_sum.bucket_mb=0.001")  # several buckets for such a small model
    sizes = (1, 2, 3)
    every_case = False  # a sample of the cases: seconds instead of minutes
