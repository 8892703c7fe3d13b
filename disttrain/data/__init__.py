"""Data: order, plan, fetching, positions. Knows parts, not ranks. Enters: strategy (micro-batches), engine."""

from disttrain.data.batches import Batches, is_lost_worker, lost_worker
from disttrain.data.byte_text import ByteText
from disttrain.data.evaluation import EvaluationBatches
from disttrain.data.order import Order
from disttrain.data.plan import MicroBatch, StepBatch, align_batches, plan_step

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
