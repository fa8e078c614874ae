"""Labels of tokens: drawing them from what a model predicts, and the gradient of their loss, in pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from avss_dist.corpus.shards import Batch
from avss_dist.stats.layer_stats import Float64

LOGIT_BYTES = 128 << 20  # of the logits that exist at once, in float32; of 262,144 tokens, after 128
WIDENED_BYTES = 16 << 20  # of logits on a CPU: larger pieces would be taken from the system anew each time


def pieces(number: int, vocabulary: int, most: int) -> list[slice]:
    """Tokens, so many in all, whose logits take ``most`` bytes at most in float32; at least one at a time."""
    some = max(1, most // (4 * vocabulary))
    return [slice(start, min(start + some, number)) for start in range(0, number, some)]


def widened(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits, [tokens, vocabulary], in float32: some of them at a time."""
    most = WIDENED_BYTES if logits.device.type == "cpu" else LOGIT_BYTES
    for piece in pieces(len(logits), logits.shape[1], most):
        yield piece, logits[piece].float()


def loss_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the cross entropy of labels, int64[tokens], at logits, [tokens, vocabulary]: the prediction, less 1 there."""
    found = torch.empty_like(logits)
    for piece, wide in widened(logits):
        probabilities = wide.softmax(dim=-1)
        of = labels[piece, None]
        found[piece] = probabilities.scatter_add_(1, of, probabilities.new_full(of.shape, -1.0))
    return found


def draw_labels(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64[draws, tokens], by inverting the distribution function at uniform numbers, float64[draws, tokens]."""
    found = torch.empty(uniform.shape, dtype=torch.int64, device=logits.device)
    for piece, wide in widened(logits):
        below = wide.double().softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(below, uniform[:, piece].T.contiguous(), right=True)
        found[:, piece] = drawn.clamp_max_(logits.shape[-1] - 1).T
    return found


def uniform_numbers(batch: Batch, draws: int, seed: int) -> Float64:
    """float64[draws, rows, tokens - 1] in [0, 1): of each row by its tokens and the seed, not by the rows beside it."""
    rows, tokens = batch.input_ids.shape
    found = np.zeros((draws, rows, max(0, tokens - 1)))
    for row, (ids, real) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        seen = ids[real].astype(np.int32)
        digest = np.frombuffer(hashlib.sha256(seen.tobytes()).digest(), np.uint32)
        numbers = np.random.default_rng([seed, *digest.tolist()]).random((max(0, len(seen) - 1), draws))
        found[:, row, : len(numbers)] = numbers.T
    return found
