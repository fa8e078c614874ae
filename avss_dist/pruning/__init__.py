"""Pruning: plans of layers and of linear maps, selection of layers, pruned checkpoints and their repair."""
