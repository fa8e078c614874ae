"""Error of the student's hidden states behind each cut, as a further loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.layers import first_tensor
from avss_dist.models.loading import without_head
from avss_dist.models.size import find_layers


def matching_layers(removed: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return a pair of layers for each cut: that of the student before it, and that of the teacher whose output it has.

    Layers that are removed before the first remaining one make no pair: nothing before them can be trained.

    Args:
        removed: removed layers, counted in the teacher, ascending.
    """
    last = [layer for layer in removed if layer + 1 not in removed]
    before = [layer - sum(other <= layer for other in removed) for layer in last]
    return tuple((student, teacher) for student, teacher in zip(before, last, strict=True) if student >= 0)


class CutStates:
    """The hidden states of both models behind each cut, in the last forward pass of each.

    Args:
        student: the model to train, with an adapter or without.
        removed: removed layers, counted in the teacher.
        settings: of the student.
    """

    def __init__(self, student: Any, teacher: Any, removed: Sequence[int], settings: Settings) -> None:
        self._states: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = ({}, {})
        pairs = matching_layers(removed)
        self._cuts = len(pairs)
        models = student.get_base_model() if hasattr(student, "get_base_model") else student, teacher
        for model, states, chosen in zip(models, self._states, zip(*pairs, strict=True), strict=True):
            layers = find_layers(without_head(model), model.config.get_text_config(), settings)
            for cut, layer in enumerate(chosen):
                layers[layer].register_forward_hook(partial(_keep, states, cut))

    def error(self, counted: torch.Tensor) -> torch.Tensor:
        """Return the squared error relative to the teacher, summed over counted tokens, a mean over the cuts.

        It is divided by the teacher's mean square for each token, as some tokens have hidden states that are a thousand
        times as large as those of others.

        Args:
            counted: bool[rows * tokens].

        Raises:
            ModelError: a layer returns no hidden states by token.
        """
        student, teacher = self._states
        total = torch.zeros((), device=counted.device)
        for cut in range(self._cuts):
            actual, expected = (states.pop(cut).flatten(0, -2).float() for states in (student, teacher))
            if not len(actual) == len(expected) == len(counted):
                raise ModelError(
                    f"Layers of the student return {len(actual)} hidden states for {len(counted)} tokens.",
                    "Leave out `hidden_loss`.",
                )
            errors = (actual - expected)[counted].square().sum(dim=-1)
            squares = expected[counted].square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            total = total + (errors / squares).sum() / self._cuts
        return total


def _keep(states: dict[int, torch.Tensor], cut: int, _module: nn.Module, _args: Any, output: Any) -> None:
    hidden = first_tensor(output)
    assert hidden is not None
    states[cut] = hidden
