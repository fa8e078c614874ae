"""Checkpoints: finding, opening, sizes, layers and sites, skipped layers, safetensors."""
