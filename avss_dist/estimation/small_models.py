"""Checkpoints of a few layers of a model, with random weights, on which the cost of a layer is measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import build, quiet

VOCABULARY = 1024  # an embedding is only looked up: a small one costs the same


def save_layers(config: Any, layers: int, settings: Settings, dtype: torch.dtype, folder: Path) -> Checkpoint:
    """Save a checkpoint of the first layers of a model, with random weights."""
    torch.manual_seed(0)
    model = build(shortened(config, layers), settings, dtype, torch.device("cpu"))
    with quiet():
        model.save_pretrained(folder)
    return Checkpoint(name=str(folder), source="folder", path=str(folder), revision="")


def shortened(config: Any, layers: int) -> Any:
    """Return the configuration of the part that reads text, with fewer layers and a small vocabulary."""
    short = copy.deepcopy(config.get_text_config())
    whole = short.num_hidden_layers
    for name, value in list(vars(short).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(short, name, value[:layers])
        elif name.endswith("_token_id"):
            setattr(short, name, None)
    short.num_hidden_layers = layers
    short.vocab_size = min(VOCABULARY, short.vocab_size)
    if hasattr(short, "quantization_config"):
        del short.quantization_config
    return short
