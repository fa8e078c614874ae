"""Choice of the weights that distillation trains: all, those around the cuts, or a low-rank adapter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import TRAINED, Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import without_head
from avss_dist.models.size import find_layers, token_embeddings
from avss_dist.pruning.model_card import removed_layers

ALL, NEAR, LORA = TRAINED
LEARNING_RATES = {ALL: 2e-4, NEAR: 3e-4, LORA: 1e-3}
"""Learning rate by the weights that are trained."""


def require_trainable(student: Checkpoint, train: str) -> None:
    """Raise ConfigError if weights cannot be chosen, before anything is loaded."""
    if train == LORA and find_spec("peft") is None:
        raise ConfigError("`train` lora needs peft, which is not installed.", "pip install 'avss_dist[lora]'")
    if train == NEAR and not removed_layers(student.folder):
        raise ConfigError(
            f"`train` near: nothing in '{student.name}' says which layers were removed. Expected the model card "
            f"(README.md) that avss prune and avss shrink write, in {Path(student.folder)}.",
            "Copy the model card into the folder, or set `train` all.",
        )


def near_cuts(removed: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Return the indices of the layers next to a cut, counted in the pruned model.

    Args:
        removed: removed layers, counted in the whole model.
        num_layers: number of layers of the pruned model.
    """
    keep = [layer for layer in range(num_layers + len(removed)) if layer not in removed]
    neighbours = {layer + step for layer in removed for step in (-1, 1)}
    return tuple(index for index, layer in enumerate(keep) if layer in neighbours)


def choose_trained(model: Any, student: Checkpoint | str, train: str, rank: int, settings: Settings) -> Any:
    """Return the model to train. Weights that are not trained require no gradient.

    Args:
        model: the student, or its skeleton on the meta device.
        student: the checkpoint, or a hub id, of which `NEAR` cannot be chosen.
        train: one of `core.settings.TRAINED`.
        rank: rank of the adapter for `LORA`.

    Raises:
        ConfigError: the number of layers does not fit the record of the removed ones.
    """
    if train == LORA:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    if train == NEAR:
        assert isinstance(student, Checkpoint)
        model.requires_grad_(False)
        layers = find_layers(without_head(model), model.config.get_text_config(), settings)
        for index in near_cuts(removed_layers(student.folder), len(layers)):
            layers[index].requires_grad_(True)
        return model
    model.requires_grad_(True)
    embeddings, head = token_embeddings(model), model.get_output_embeddings()
    if isinstance(embeddings, nn.Module) and getattr(head, "weight", None) is getattr(embeddings, "weight", model):
        embeddings.requires_grad_(False)
    return model
