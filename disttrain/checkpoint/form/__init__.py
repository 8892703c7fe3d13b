"""Defines the on-disk form of a checkpoint: boxes, tensor bytes, checksums and the manifest."""
