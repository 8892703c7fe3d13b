"""Lists, compares, removes and retains the checkpoints in a folder."""
