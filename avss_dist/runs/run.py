"""Progress of one run into the warehouse: results as they come, then merge, block by block, score, commit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from avss_dist.core.errors import AvssError, RunFailed
from avss_dist.core.process import package_versions
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.models.checkpoint.locate import CONVERTED, Checkpoint, training_point
from avss_dist.models.checkpoint.quantization import describe_quantization
from avss_dist.partition.replica import Placement
from avss_dist.runs.work import ReplicaSpec, RunShards
from avss_dist.stats.catalog import BASELINES, RECIPES
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import (
    LayerStats,
    Merged,
    ShardResult,
    StratumKey,
    combine_blocks,
    merge_stats,
    split_into_blocks,
)
from avss_dist.stats.scores import score_run
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import OpenShared, Receipt, Store

SHOWN = ("layer", "depth", "avss_smoothed", "avss_low", "avss_high", "rank", "variance", "sparsity", *BASELINES)


@dataclass(frozen=True, kw_only=True, repr=False)
class Run(TabularResult):
    """One checkpoint scored on one corpus. Its table has the scores.

    Attributes:
        run_id: id in the warehouse.
        model: the model as the user named it.
        warehouse: folder or URI of its warehouse.
        status: ``done``, ``skipped`` (it was done before) or ``failed``.
        num_shards, resumed_shards: number of shards, and of those that an earlier attempt measured.
        num_tokens: tokens that count in the statistics.
        seconds: wall time of this attempt, since its text was read.
        error: error message of a failed run, or None.
    """

    run_id: str
    model: str
    warehouse: str
    status: str
    num_shards: int = 0
    resumed_shards: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    _bars = ("avss_smoothed",)

    def table(self) -> pa.Table:
        """Return the scores at the published site, recipe and threshold, by layer. See `scores` for others."""
        at = {"site": SITES[0], "recipe": RECIPES[0], "threshold": PUBLISHED_THRESHOLD, "threshold_kind": "absolute"}
        scores = self.scores(**at).sort_by("layer")
        return scores.select([name for name in SHOWN if name in scores.column_names])

    def summary(self) -> str:
        """Return the run id, status and number of tokens, in a line."""
        return f"{self.run_id}, {self.status}, {self.num_tokens:,} tokens"

    def scores(self, **equals: Any) -> pa.Table:
        """Return this run's rows of ``scores`` whose columns equal the given values: ``run.scores(site="block")``."""
        return Warehouse(self.warehouse).scores(run_id=self.run_id, **equals)


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A planned run, before a weight is loaded.

    Attributes:
        replicas: model copies that work in parallel.
    """

    replica_spec: ReplicaSpec
    corpus: CorpusPlan
    fingerprint: str
    run: Run
    replicas: int

    @property
    def expected(self) -> dict[int, str]:
        """Content hashes of the shards, by id."""
        return {shard.shard_id: shard.content_hash for shard in self.corpus.shards}


MERGED_HERE = 400  # shards; merging more is distributed to workers

Expected = Mapping[int, str]
"""Content hashes of shards by id, in order."""
Apply = Callable[[Callable[[Expected], Any], Sequence[Expected]], Iterable[Any]]
"""Applies a function to every item, in order. See `runs.local.LocalExecutor.apply`."""


@dataclass
class ShardSummary:
    """Summary of the shards of a run, for its row.

    Attributes:
        layers, model, device: those of the last shard, with the notes of all shards.
        peak_memory_bytes: maximum over shards.
        seconds: sum over shards.
    """

    layers: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    peak_memory_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: ShardResult | ShardSummary) -> None:
        """Add a later shard, or a summary of later shards."""
        notes = list(dict.fromkeys([*self.model.get("notes", ()), *other.model["notes"]]))
        self.layers, self.model, self.device = other.layers, {**other.model, "notes": notes}, other.device
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)
        self.seconds += other.seconds


def merge_partials(
    store: Store, run_id: str, expected: Expected, shared: OpenShared, apply: Apply
) -> tuple[Merged, ShardSummary]:
    """Merge the partials of a run, and summarize its shards.

    Args:
        expected: content hash of every shard, from shard 0.
        shared: opens the warehouse in workers.
        apply: merges blocks on workers, if there are more than `MERGED_HERE` shards.

    Returns:
        Statistics of the run and of its blocks, and the summary.

    Raises:
        RunFailed: a partial is missing or damaged.
    """
    blocks = [{i: expected[i] for i in ids} for ids in split_into_blocks(len(expected), BOOTSTRAP_BLOCKS)]
    summary = ShardSummary()

    def each() -> Iterator[Mapping[StratumKey, LayerStats]]:
        elsewhere = len(expected) > MERGED_HERE
        results = apply(partial(_read_block, shared, run_id), blocks) if elsewhere else [None] * len(blocks)
        for block, result in zip(blocks, results, strict=True):
            merged, summary_of_block = result or _read_block(lambda: store, run_id, block)
            summary.add(summary_of_block)
            yield merged

    return combine_blocks(each()), summary


def _read_block(shared: OpenShared, run_id: str, expected: Expected) -> Any:
    """Return the merged statistics of a block and its `ShardSummary`, or None if this process sees no warehouse."""
    store = shared()
    if store is None:
        return None
    summary = ShardSummary()

    def each() -> Iterator[Mapping[StratumKey, LayerStats]]:
        for shard_id, shard in zip_longest(expected, store.each_shard(run_id, expected)):
            if shard is None or shard.shard_id != shard_id:
                raise RunFailed(
                    f"The partial of shard {shard_id} is damaged or missing.",
                    "Run the same command again: it measures that shard again, and keeps the others.",
                )
            summary.add(shard)
            yield shard.strata

    return merge_stats(each()), summary


class RunInProgress:
    """Writer of a run that is being measured. It does not change.

    Attributes:
        run: the run, with the number of shards that earlier attempts have measured.
        shards: shards that no earlier attempt has measured.
    """

    def __init__(self, planned: PlannedRun, store: Store, *, fresh: bool) -> None:
        self._planned, self._store = planned, store
        self._start = time.perf_counter()
        expected = planned.expected
        stored = set() if fresh else {shard.shard_id for shard in store.each_shard(planned.run.run_id, expected)}
        missing = [shard for shard in planned.corpus.shards if shard.shard_id not in stored]
        self.run = replace(planned.run, resumed_shards=len(stored))
        self._shared = store.write_plan(
            planned.run.run_id,
            model=planned.replica_spec.checkpoint.name,
            corpus=planned.corpus.source,
            dtype=planned.replica_spec.settings.dtype,
            num_tokens=planned.run.num_tokens,
            num_shards=planned.run.num_shards,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.shards = RunShards(
            run_id=self.run.run_id, replica_spec=planned.replica_spec, shards=missing, warehouse=self._shared
        )

    @property
    def done_tokens(self) -> int:
        """Tokens that an earlier attempt has measured."""
        return self._planned.corpus.num_tokens - sum(shard.num_tokens for shard in self.shards.shards)

    @property
    def placement(self) -> Placement:
        """Placement of the run's replicas on devices."""
        return self._planned.replica_spec.placement

    def store(self, result: ShardResult | Receipt) -> None:
        """Write a result, unless its worker has written it."""
        if isinstance(result, Receipt):
            files = result.files
        else:
            files = encode_shard(self._identity(result.model["family"]), result)
        self._store.write_shard_files(self.run.run_id, result.shard_id, files)

    def finish(self, apply: Apply, *, begun: float | None, notes: Sequence[str]) -> Run:
        """Merge, score and commit the run, after every shard was written.

        Args:
            apply: see `merge_partials`.
            begun: when the first shard of this attempt was begun, by ``time.perf_counter``. None if all were stored.
            notes: what happened while it was measured, for its row.
        """
        expected, corpus = self._planned.expected, self._planned.corpus
        measured = time.perf_counter()
        merged, shards = merge_partials(self._store, self.run.run_id, expected, self._shared, apply)
        layers = shards.layers
        identity = self._identity(shards.model["family"])
        self._store.write_layer_stats(identity, layers, merged.stats, merged.strata)
        if self._planned.replica_spec.settings.experts:
            self._store.merge_experts(identity, layers, expected)
        self._store.write_rows("scores", identity, score_run(merged.stats, layers, merged.blocks))
        if begun is None:
            speed = corpus.num_tokens / max(shards.seconds, 1e-9)
        else:
            speed = (corpus.num_tokens - self.done_tokens) / (measured - begun)
        converted = []
        if (self._planned.replica_spec.checkpoint.folder / CONVERTED).is_file():
            converted = ["the weights were stored as pickles; they were converted to safetensors"]
        self.record(
            status="done",
            num_layers=len(layers),
            tokens_per_second=speed,
            device=shards.device,
            peak_memory_bytes=shards.peak_memory_bytes,
            **{**shards.model, "notes": [*shards.model["notes"], *converted, *notes]},
        )
        return replace(self.run, status="done", seconds=time.perf_counter() - self._start)

    def record_failure(self, error: AvssError) -> None:
        """Write the row of the failed run."""
        self.record(status="failed", error=str(error))

    def _identity(self, family: str) -> RunIdentity:
        checkpoint = self._planned.replica_spec.checkpoint
        return RunIdentity(run_id=self.run.run_id, model=checkpoint.name, revision=checkpoint.revision, family=family)

    def record(self, *, status: str, **columns: Any) -> None:
        """Write the run's row."""
        row = {
            "run_id": self.run.run_id,
            "fingerprint": self._planned.fingerprint,
            "status": status,
            "created_at": datetime.now(UTC),
            "replicas": self._planned.replicas,
            "wall_seconds": time.perf_counter() - self._start,
            "versions": package_versions(),
        }
        settings = self._planned.replica_spec.settings
        row |= _model_columns(self._planned.replica_spec.checkpoint, settings)
        row |= _text_columns(self._planned.corpus, settings)
        row |= {
            "batch_size": settings.batch_size,
            "thresholds": list(settings.thresholds),
            "sites": list(settings.sites),
            "settings": json.dumps(settings.as_dict()),
        }
        self._store.write_run({**row, **columns})
        self._store.finish_plan(self.run.run_id)


def _model_columns(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """Return the columns of ``runs`` that tell which model was measured."""
    series, step, tokens = training_point(checkpoint)
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "revision_name": checkpoint.revision_name or None,
        "series": series,
        "training_step": step,
        "training_tokens": tokens,
        "quantization": describe_quantization(checkpoint, settings),
    }


def _text_columns(corpus: CorpusPlan, settings: Settings) -> dict[str, Any]:
    """Return the columns of ``runs`` that tell which text was read, and how it was divided."""
    return {
        "corpus": corpus.source,
        "corpus_fingerprint": corpus.corpus_fingerprint,
        "tokens_fingerprint": corpus.tokens_fingerprint,
        "chat_template": corpus.chat_template,
        "shuffle_seed": settings.shuffle_seed,
        "num_sequences": corpus.num_sequences,
        "num_tokens": corpus.num_tokens,
        "sequence_length": settings.sequence_length,
        "num_shards": len(corpus.shards),
    }
