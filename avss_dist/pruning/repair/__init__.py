"""Repair of pruned models: least-squares fits on text, folded into the weights of the remaining layers."""
