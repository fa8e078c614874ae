"""Reductions of activations on the device that holds them: numba on CPUs, torch elsewhere."""
