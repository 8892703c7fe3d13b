"""Translates the configuration of accelerate and DeepSpeed into disttrain's. Imports no torch."""
