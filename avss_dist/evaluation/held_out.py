"""Held-out text: whether what is evaluated on is what the scores of a plan were measured on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from avss_dist.corpus.shards import Ids, Shard, plan
from avss_dist.errors import AvssError, ConfigError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.settings import Settings
from avss_dist.tasks.base import Task, TextLoss
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

WINDOW = 32  # tokens that two texts have in common, in a row, before they are the same text
MOST_SHARED = 0.01  # of the windows of a text; phrases that every text has are fewer


def refuse_overlap(task: Task, run_id: str, store: Warehouse, checkpoint: Checkpoint, *, corpus: str = "") -> None:
    """Refuse a task on text that a run's scores were measured on; tasks without a corpus pass.

    Args:
        corpus: the text of the run, with the keys that reading it takes; by default as its row names it, without.

    Raises:
        ConfigError: they share text, or the run's text cannot be read again.
    """
    shards = [part.shard for part in task.parts if isinstance(part, TextLoss)]
    run = store.run(run_id)
    if not shards or run is None:
        return
    settings = Settings(**settings_of(run))
    try:
        seen = plan(corpus or run["corpus"], load_tokenizer(checkpoint), settings)
    except AvssError as error:
        raise ConfigError(
            f"The text of run {run_id} cannot be read again: {error.message}",
            "Put it back, or set `allow_overlap` and know that the layers may have been chosen on this very text.",
        ) from error
    shared = shared_text(seen.shards, shards)
    if shared > MOST_SHARED:
        raise ConfigError(
            f"{shared:.0%} of {task.name} is text that the scores of {run_id} were measured on ({run['corpus']}).",
            f"Evaluate on other text: another corpus, or `skip_sequences` {run['num_sequences']}.",
        )


def shared_text(seen: Iterable[Shard], read: Iterable[Shard]) -> float:
    """The share of the windows of ``WINDOW`` tokens in ``read`` that ``seen`` has too, wherever they begin."""
    known = _windows(seen)
    windows = _windows(read)
    return float(np.isin(windows, known).mean()) if len(windows) else 0.0


def _windows(shards: Iterable[Shard]) -> NDArray[np.uint64]:
    """A hash of every window of tokens, of all rows."""
    powers = np.random.default_rng(0).integers(1, 1 << 63, WINDOW, np.uint64) | np.uint64(1)
    found = [
        _row_windows(shard.input_ids[row, : shard.lengths[row]], powers)
        for shard in shards
        for row in range(shard.num_sequences)
    ]
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def _row_windows(ids: Ids, powers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    if len(ids) < WINDOW:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), WINDOW)
    hashes: NDArray[np.uint64] = windows @ powers
    return hashes
