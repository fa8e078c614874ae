"""What a shard gives: hooks read activations, kernels reduce them to LayerStats."""
