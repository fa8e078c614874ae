"""Calibration text: sources, documents, rows of tokens, shards."""
