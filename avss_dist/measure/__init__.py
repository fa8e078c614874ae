"""Measurement of a shard: hooks read activations, kernels reduce them to LayerStats."""
