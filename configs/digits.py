"""Loads scikit-learn's handwritten digits as a dataset. The images come with the package."""

from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def digits(split: Literal["train", "held_out"]) -> TensorDataset:
    """Returns pairs of a flat image (64 floats in [0, 1]) and its class. Every fifth image is held out."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16.0
    classes = torch.tensor(data.target, dtype=torch.int64)
    held_out = torch.arange(len(images)) % 5 == 0
    chosen = held_out if split == "held_out" else ~held_out
    return TensorDataset(images[chosen], classes[chosen])
