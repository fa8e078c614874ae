"""One shard through one replica: a pure function from tokens to a ShardResult."""

from __future__ import annotations

import resource
import time

import torch

from avss_dist.config import Settings
from avss_dist.corpus import Shard
from avss_dist.errors import ModelError
from avss_dist.observe import observe
from avss_dist.partition.base import Replica
from avss_dist.stats import ShardResult


def analyze_shard(replica: Replica, shard: Shard, settings: Settings) -> ShardResult:
    """Measure a shard. Nothing is kept between calls, and nothing is left on the model.

    Raises:
        ModelError: a layer cannot be observed, or a site was asked for that no layer has.
    """
    start = time.perf_counter()
    if replica.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(replica.device)
    with observe(replica.layers, settings.sites, settings.thresholds, counts=replica.reports_stats) as observer:
        replica.forward(list(shard.batches(settings.batch_size)), lambda batch: observer.batch(batch.observed))
        stats = observer.result()
    if not stats:
        raise ModelError(
            f"The model has none of the sites {', '.join(settings.sites)}.", "; ".join(replica.model["notes"]) or None
        )
    return ShardResult(
        shard_id=shard.shard_id,
        content_hash=shard.content_hash,
        layers=tuple(layer.name for layer in replica.layers),
        stats=stats,
        num_tokens=shard.num_tokens,
        seconds=time.perf_counter() - start,
        device=_device_name(replica.device),
        model=replica.model,
        peak_memory_bytes=_peak_memory_bytes(replica.device),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
