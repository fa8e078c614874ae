"""Checkpoints: finding, loading, sizes, stored formats."""
