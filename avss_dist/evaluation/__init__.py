"""Evaluation of models and plans: evaluate, ablate, search, experiment, shrink and sparsify."""
