"""Evaluation of models and plans: evaluate, ablate, search, experiment, shrink, sparsify and quantize."""
