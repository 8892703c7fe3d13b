"""Provides the built-in models, the initialization of any model, synchronized batch norm, and text generation."""

from disttrain.model.batch_norm import synchronize_batch_norm
from disttrain.model.gpt import GPT
from disttrain.model.initialize import build_model, fill, fill_self, says_how
from disttrain.model.mlp import MLP
from disttrain.model.sample import generate, logits_of

__all__ = [
    "GPT",
    "MLP",
    "build_model",
    "fill",
    "fill_self",
    "generate",
    "logits_of",
    "says_how",
    "synchronize_batch_norm",
]
