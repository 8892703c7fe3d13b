"""Turns datasets into the micro-batches of each step, from any position and for any number of data-parallel parts.

The package works with parts of a step (index and count), not with ranks. `engine` builds the batches, and `strategy`
receives their micro-batches.
"""

from disttrain.data.batches import Batches, is_lost_worker, lost_worker
from disttrain.data.byte_text import ByteText
from disttrain.data.evaluation import EvaluationBatches
from disttrain.data.sample_order import Order
from disttrain.data.step_plan import MicroBatch, StepBatch, align_batches, plan_step

__all__ = [
    "Batches",
    "ByteText",
    "EvaluationBatches",
    "MicroBatch",
    "Order",
    "StepBatch",
    "align_batches",
    "is_lost_worker",
    "lost_worker",
    "plan_step",
]
