"""Calibration text: sources, documents, token rows, shards."""
