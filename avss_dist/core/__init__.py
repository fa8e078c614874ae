"""Shared by every package: errors, texts, checked settings, and the registry of partitions and scores."""
