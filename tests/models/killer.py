"""An objective that kills its process: KILL="RANK:STEP:WHERE" in the environment says which rank, when and where."""

import os
import signal
import threading
import time
from pathlib import Path

import torch.nn.functional as F  # noqa: N812


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(folder):
    """Kill this process as soon as a checkpoint is being written."""
    while True:
        if any(Path(folder).glob("checkpoints/.tmp-*/*")):
            die()
        time.sleep(0)


class Mortal:
    def __init__(self, folder):
        self.folder = folder
        self.watching = False

    def weigh(self, batch):
        return batch[1].numel()

    def forward(self, model, batch, context):
        if context.training and "KILL" in os.environ:
            rank, step, where = os.environ["KILL"].split(":")
            if os.environ.get("RANK", "0") == rank and context.step + 1 == int(step):
                if where == "forward":
                    die()
                if where == "saving" and not self.watching:
                    self.watching = True
                    threading.Thread(target=die_while_saving, args=(self.folder,), daemon=True).start()
        return model(batch[0])

    def loss(self, logits, batch):
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum")
