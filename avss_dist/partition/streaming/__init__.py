"""One layer at a time in memory: weights are read from the checkpoint once for each shard."""
