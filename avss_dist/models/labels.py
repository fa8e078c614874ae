"""Labels of tokens: drawn from a model's predictions, and the gradient of their loss, in pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from avss_dist.corpus.shards import Batch
from avss_dist.stats.layer_stats import Float64

LOGIT_BYTES = 128 << 20  # of the logits that exist at once, in float32; of 262,144 tokens, after 128
WIDENED_BYTES = 16 << 20  # of logits on a CPU: larger pieces would be taken from the system anew each time


def pieces(number: int, vocabulary: int, maximum: int) -> list[slice]:
    """Return slices of ``number`` tokens whose float32 logits take at most ``maximum`` bytes; one token at least."""
    step = max(1, maximum // (4 * vocabulary))
    return [slice(start, min(start + step, number)) for start in range(0, number, step)]


def float32_pieces(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield logits, [tokens, vocabulary], in float32, as (slice of tokens, piece)."""
    maximum = WIDENED_BYTES if logits.device.type == "cpu" else LOGIT_BYTES
    for piece in pieces(len(logits), logits.shape[1], maximum):
        yield piece, logits[piece].float()


def loss_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the summed cross entropy at logits, [tokens, vocabulary]: softmax minus one-hot label.

    Args:
        labels: int64[tokens].
    """
    gradient = torch.empty_like(logits)
    for piece, wide in float32_pieces(logits):
        probabilities = wide.softmax(dim=-1)
        targets = labels[piece, None]
        gradient[piece] = probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
    return gradient


def draw_labels(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return labels drawn from the softmax of logits, int64[draws, tokens], by inversion of its distribution function.

    Args:
        uniform: uniform numbers in [0, 1), float64[draws, tokens].
    """
    drawn_labels = torch.empty(uniform.shape, dtype=torch.int64, device=logits.device)
    for piece, wide in float32_pieces(logits):
        below = wide.double().softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(below, uniform[:, piece].T.contiguous(), right=True)
        drawn_labels[:, piece] = drawn.clamp_max_(logits.shape[-1] - 1).T
    return drawn_labels


def uniform_numbers(batch: Batch, draws: int, seed: int) -> Float64:
    """Return uniform numbers in [0, 1), float64[draws, rows, tokens - 1]; a row's depend on its tokens and the seed."""
    rows, tokens = batch.input_ids.shape
    uniform = np.zeros((draws, rows, max(0, tokens - 1)))
    for row, (ids, real) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        tokens_of_row = ids[real].astype(np.int32)
        digest = np.frombuffer(hashlib.sha256(tokens_of_row.tobytes()).digest(), np.uint32)
        numbers = np.random.default_rng([seed, *digest.tolist()]).random((max(0, len(tokens_of_row) - 1), draws))
        uniform[:, row, : len(numbers)] = numbers.T
    return uniform
