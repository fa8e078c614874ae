"""Small causal models, open, and random rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.replica import Replica
from support.checkpoints import checkpoint_at

SMALL = {"max_sequences": 6, "sequence_length": 32, "batch_size": 4, "sequences_per_shard": 3, "device": "cpu"}


def random_shard(rows: int = 5, tokens: int = 24, high: int = 120, skip: int = 0) -> Shard:
    rng = np.random.default_rng(0)
    return Shard(
        shard_id=0,
        input_ids=rng.integers(10, high, (rows, tokens)).astype(np.int32),
        lengths=np.array([tokens, tokens, 9, tokens, 17][:rows], np.int32),
        skip_first_tokens=skip,
        content_hash="",
    )


def packed_or_padded(*, padded: bool = False, rows: int = 5, tokens: int = 12) -> Shard:
    """Return rows of token ids under 120; padded ones have 2 and more real tokens, but the first."""
    rng = np.random.default_rng(0)
    lengths = np.full(rows, tokens, np.int32)
    if padded:
        lengths[1:] = rng.integers(2, tokens, rows - 1)
    ids = rng.integers(10, 120, (rows, tokens)).astype(np.int32)
    return Shard(shard_id=0, input_ids=ids, lengths=lengths, skip_first_tokens=0, content_hash="")


def open_whole(checkpoint: Checkpoint, settings: Settings) -> LanguageModel:
    """A checkpoint with its head on one device."""
    model = Replica(checkpoint, settings, head=True).language_model
    assert model is not None
    return model


def opened(folder: Path, **changes: Any) -> LanguageModel:
    return open_whole(checkpoint_at(folder), Settings(**SMALL | {"batch_size": 2} | changes))
