"""Comparison of a checkpoint, as transformers computes it, with inference servers that serve it."""
