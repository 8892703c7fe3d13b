"""Implements the `disttrain ckpt` commands, one module per command."""
