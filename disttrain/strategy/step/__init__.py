"""Computes one optimizer step: sums, scaling, clipping and the update. Every strategy shares it."""
