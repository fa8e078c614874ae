"""Activation sparsity: plans, and the allocation of a budget over linear maps."""
