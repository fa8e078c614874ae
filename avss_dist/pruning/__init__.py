"""Pruning: plans, selection of layers, pruned checkpoints and their repair."""
