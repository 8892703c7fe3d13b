"""Lists the short names of disttrain's models, objectives, datasets, schedules and trackers, by section."""

from __future__ import annotations

NAMES: dict[str, dict[str, str]] = {
    "model": {"gpt": "disttrain.model.gpt:GPT", "mlp": "disttrain.model.mlp:MLP"},
    "objective": {
        "next_token": "disttrain.objective.language:NextToken",
        "cross_entropy": "disttrain.objective.supervised:CrossEntropy",
        "mse": "disttrain.objective.supervised:MSE",
    },
    "data": {"byte_text": "disttrain.data.byte_text:ByteText"},
    "optim": {},
    "schedule": {
        name: f"disttrain.optim.schedules:{name}" for name in ("constant", "linear", "cosine", "warmup_stable_decay")
    },
    "trackers": {"tensorboard": "disttrain.report.trackers:TensorBoardTracker"},
}
