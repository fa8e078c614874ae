"""Shared by every package: errors, texts, checked settings, the registry of partitions and scores, and this machine."""
