"""The `disttrain ckpt` commands."""
