"""The `fsdp` strategy: FSDP2 and tensor parallelism."""
