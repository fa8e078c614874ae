"""A forward pass that is under way: whose it is, what counts in it, and where it is."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from avss_dist.corpus.pairs import Pairing
from avss_dist.measure.rows import ObservedTokens
from avss_dist.models.layers import Layer
from avss_dist.settings import AFTER_ANOTHER
from avss_dist.system.devices import sent

if TYPE_CHECKING:
    from avss_dist.measure.hooks import Observer


@dataclass
class Entered:
    """The layer that is running, and what went in."""

    layer: Layer
    hidden: torch.Tensor | None
    version: int


@dataclass
class Pass:
    """See the module.

    Attributes:
        mask: bool[rows, tokens], what counts; None where nothing does.
        own: the rows that this process counts.
        strata: the masks of strata in them; of text that is not paired, the mask alone.
        masks, tokens: what counts in them, by device.
        first_tokens: places of the first tokens that count, by device and stratum; see `first_tokens_on`.
        calls: how often each layer's module has run.
    """

    observer: Observer
    mask: torch.Tensor | None
    own: slice
    strata: dict[str, torch.Tensor]
    pairing: Pairing | None
    masks: dict[torch.device, dict[str, torch.Tensor]] = field(default_factory=dict)
    tokens: dict[torch.device, ObservedTokens] = field(default_factory=dict)
    first_tokens: dict[torch.device, dict[str, torch.Tensor]] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    entered: Entered | None = None

    def masks_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The masks of strata on a device."""
        if device not in self.masks:
            self.masks[device] = {name: sent(mask.numpy(), device) for name, mask in self.strata.items()}
        return self.masks[device]

    def first_tokens_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return, by stratum, the place of each row's first token that counts, int64[rows], in rows side by side."""
        if device not in self.first_tokens:
            self.first_tokens[device] = {
                name: sent(_first_tokens(m.numpy()), device) for name, m in self.strata.items()
            }
        return self.first_tokens[device]

    @property
    def own_answers(self) -> torch.Tensor | None:
        """The mask without answers of paired text that follow another prompt than their own."""
        if self.mask is None or self.pairing is None:
            return self.mask
        own = [not label.endswith(AFTER_ANOTHER) for label in self.pairing.strata]
        return self.mask & torch.tensor(own)[:, None]


def _first_tokens(mask: np.ndarray) -> np.ndarray:
    """Return the flat index of the first True of each row that has one, int64[rows], of bool[rows, tokens]."""
    rows = np.flatnonzero(mask.any(axis=1))
    return rows * mask.shape[1] + mask[rows].argmax(axis=1)


PASSES: ContextVar[tuple[Pass, ...]] = ContextVar("passes", default=())
"""Those of this thread or greenlet, the innermost last."""
