"""Default size of a shard: work for half a minute to a minute, in enough shards for intervals.

The size is computed from the model, the kind of device and the text when a run is planned. It depends neither on a
timed benchmark nor on the workers, so the same run has the same shards wherever it is resumed, on any number of
workers.
"""

from __future__ import annotations

from dataclasses import replace

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import USUAL_ROWS, CorpusPlan
from avss_dist.models.size import Footprint

# Changing one of these changes the shards, and so the id, of every run without an explicit size.
MOST_SECONDS = 60  # of a shard on a typical device; at least half of that, as sizes are doubled
FEWEST_SHARDS = 16  # for intervals over shards; a text of fewer rows has one shard a row
MOST_WAITING_BYTES = 4 << 30  # hidden states of a shard, which wait together where layers are streamed
FLOPS_OF_A_THREAD = {2: 150e9, 4: 75e9}  # a second, by the bytes of an element, with all that is measured
FLOPS_OF_A_GPU = {2: 200e12, 4: 20e12}


def split_into_shards(corpus: CorpusPlan, size: Footprint | None, settings: Settings) -> tuple[CorpusPlan, Settings]:
    """Split a corpus into shards of the default size, unless the settings have a size.

    Args:
        size: size of the model; None if unknown.
        settings: pinned settings, without ``auto``.

    Returns:
        The corpus in shards, and the settings with their size.
    """
    if settings.sequences_per_shard is not None:
        return corpus, settings
    rows = rows_per_shard(size, settings, corpus.num_sequences)
    return corpus.recut(rows), replace(settings, sequences_per_shard=rows)


def rows_per_shard(size: Footprint | None, settings: Settings, num_sequences: int) -> int:
    """Return the number of rows in a shard: a batch times a power of two. Only short texts have smaller shards."""
    limit = float(USUAL_ROWS)
    if size is not None:
        rates = FLOPS_OF_A_GPU if settings.device == "cuda" else FLOPS_OF_A_THREAD
        flops = rates[2 if size.element_bytes == 2 else 4] * (1 if settings.device == "cuda" else settings.threads)
        seconds = size.forward_flops(1, settings.sequence_length) / flops
        waiting = size.hidden_bytes(1, settings.sequence_length)
        limit = min(MOST_SECONDS / max(seconds, 1e-9), MOST_WAITING_BYTES / max(waiting, 1))
    enough = num_sequences // FEWEST_SHARDS
    if enough < settings.batch_size:
        return max(1, enough)
    doublings = int(max(1.0, min(limit, enough) / settings.batch_size)).bit_length() - 1
    return int(settings.batch_size << doublings)
