"""scikit-learn's diabetes data as a dataset; the table is in the package, nothing is downloaded."""

from typing import Literal

import torch
from sklearn.datasets import load_diabetes
from torch.utils.data import TensorDataset


def diabetes(split: Literal["train", "held_out"]) -> TensorDataset:
    """Pairs of ten inputs and one target, each standardised by the training part; every fifth patient is held out."""
    found = load_diabetes(scaled=False)
    inputs = torch.tensor(found.data, dtype=torch.float32)
    targets = torch.tensor(found.target, dtype=torch.float32)[:, None]
    held_out = torch.arange(len(inputs)) % 5 == 0

    def standardised(values: torch.Tensor) -> torch.Tensor:
        train = values[~held_out]
        return (values - train.mean(dim=0)) / train.std(dim=0)

    chosen = held_out if split == "held_out" else ~held_out
    return TensorDataset(standardised(inputs)[chosen], standardised(targets)[chosen])
