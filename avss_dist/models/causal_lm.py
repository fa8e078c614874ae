"""A causal language model with its head, whole on one device: what it predicts, with any of its layers left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from avss_dist.corpus.shards import Batch
from avss_dist.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import PROBE_SHAPE, Layer
from avss_dist.models.loading import load_model, open_module, quiet
from avss_dist.models.skipping import recording, skipping
from avss_dist.settings import Settings
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

WIDENED_BYTES = 16 << 20  # of logits: larger pieces would be taken from the system anew each time


class LanguageModel:
    """Opened once, asked often; nothing that is asked leaves a trace.

    Attributes:
        module: the transformers model, head and all, in evaluation mode.
        layers: its transformer blocks, in order.
        family: ``config.model_type``.
        device: where it computes.

    Raises:
        ModelError: the checkpoint cannot be opened, or predicts no next token.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self.module = load_model(checkpoint, settings, head=True)
        if self.module.get_output_embeddings() is None:
            raise _no_head(checkpoint, self.module)
        with quiet():
            self.module.to(self.device)
            backbone = open_module(self.module, layers=settings.layers, device=self.device)
        self.layers: tuple[Layer, ...] = backbone.structure.layers
        self.family = backbone.family
        self._forms = self._find_forms()

    def _find_forms(self) -> dict[int, type]:
        """How layers return hidden states (`skip.Recorded`): what is known of a layer is no reason to run it."""
        input_ids = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=self.device).reshape(PROBE_SHAPE)
        with torch.no_grad(), recording(self.layers) as recorded:
            self.module(input_ids=input_ids, use_cache=False)
        return recorded.forms

    @contextmanager
    def without(self, drop: Collection[int]) -> Iterator[None]:
        """Inside, the model computes without the layers of these indices."""
        if wrong := [layer for layer in drop if not 0 <= layer < len(self.layers)]:
            raise ModelError(f"There is no layer {wrong[0]}: '{self.checkpoint.name}' has {len(self.layers)}, from 0.")
        with skipping(self.layers, drop, self._forms):
            yield

    def logits(self, batch: Batch) -> torch.Tensor:
        """[rows, tokens, vocabulary], on the model's device and in its dtype; gradients follow the caller's mode."""
        input_ids = torch.from_numpy(batch.input_ids).to(self.device, torch.int64)
        padded = {} if batch.attention_mask.all() else {"attention_mask": self._place(batch.attention_mask)}
        logits: torch.Tensor = self.module(input_ids=input_ids, use_cache=False, **padded).logits
        return logits

    def losses(self, batch: Batch) -> Float64:
        """float64[rows]: the negative log-likelihood, in nats, of each row's counted tokens given those before them."""
        with torch.no_grad():
            return np.array([row.item() for row in self.row_losses(self.logits(batch), batch)], np.float64)

    def row_losses(self, logits: Iterable[torch.Tensor], batch: Batch) -> Iterator[torch.Tensor]:
        """The loss of each row, float64[], from `logits`; `WIDENED_BYTES` of them are in float32 at a time."""
        targets = torch.from_numpy(batch.input_ids).to(self.device, torch.int64)[:, 1:]
        counted = self._place(predicted(batch))
        for row, target, counts in zip(logits, targets, counted, strict=True):
            some = max(1, WIDENED_BYTES // (4 * row.shape[-1]))
            pieces = zip(row[:-1].split(some), target.split(some), strict=True)
            tokens = torch.cat([cross_entropy(piece.float(), of, reduction="none") for piece, of in pieces])
            yield tokens.double().where(counts, 0).sum()

    def _place(self, mask: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(mask)).to(self.device)

    def close(self) -> None:
        """Drop the weights."""
        del self.module, self.layers
        free_device(self.device)


def _no_head(checkpoint: Checkpoint, module: Any) -> ModelError:
    name, config = type(module).__name__, module.config
    if config.get_text_config() is not config:
        return ModelError(
            f"'{checkpoint.name}' ({name}) is multimodal: only models of text alone can be evaluated.",
            "Save its language model, head and all, as a checkpoint of its own, and evaluate that.",
        )
    return ModelError(
        f"'{checkpoint.name}' ({name}) has no head that predicts the next token.", "Evaluate a causal language model."
    )


def predicted(batch: Batch) -> np.ndarray:
    """bool[rows, tokens - 1]: which tokens, of all but the first, are predicted and count."""
    return batch.observed[:, 1:] & batch.attention_mask[:, :-1]
