"""Loads scikit-learn's diabetes data as a dataset. The table comes with the package."""

from typing import Literal

import torch
from sklearn.datasets import load_diabetes
from torch.utils.data import TensorDataset


def diabetes(split: Literal["train", "held_out"]) -> TensorDataset:
    """Returns pairs of ten inputs and a target, standardized with the training split. Holds out every fifth patient."""
    data = load_diabetes(scaled=False)
    inputs = torch.tensor(data.data, dtype=torch.float32)
    targets = torch.tensor(data.target, dtype=torch.float32)[:, None]
    held_out = torch.arange(len(inputs)) % 5 == 0

    def standardized(values: torch.Tensor) -> torch.Tensor:
        train = values[~held_out]
        return (values - train.mean(dim=0)) / train.std(dim=0)

    chosen = held_out if split == "held_out" else ~held_out
    return TensorDataset(standardized(inputs)[chosen], standardized(targets)[chosen])
