"""Texts in the tokens of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.models.checkpoint.loading import load_tokenizer
from support.checkpoints import checkpoint_at


def tokenized(folder: Path, corpus: str | Path, **options: Any) -> CorpusPlan:
    """Return a text in the tokens of a checkpoint, with options of `Settings`."""
    tokenizer = load_tokenizer(checkpoint_at(folder))
    return tokenize_corpus(str(corpus), tokenizer, Settings(**options))


def rows_of(corpus: CorpusPlan) -> np.ndarray:
    """Return the rows of all shards of a text, int32[rows, tokens]."""
    return np.concatenate([shard.input_ids for shard in corpus.shards])
