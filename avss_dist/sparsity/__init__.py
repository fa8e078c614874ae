"""Activation sparsity: plans of what is zero, and how a budget is spread."""
