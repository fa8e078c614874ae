"""Shared by every package: errors, texts, checked settings, and this machine."""
