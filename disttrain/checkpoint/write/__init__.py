"""Plans which rank writes which shard, writes the files of a checkpoint, and commits it atomically."""
