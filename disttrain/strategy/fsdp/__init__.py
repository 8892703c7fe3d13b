"""Implements strategy `fsdp`: FSDP2 and tensor parallelism."""
