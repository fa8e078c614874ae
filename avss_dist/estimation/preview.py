"""What a job would do, without loading a weight: its runs, where they stand, what they may take."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from avss_dist.errors import AvssError, as_failure
from avss_dist.estimation.estimate import Arithmetic, Row, measure
from avss_dist.models.loading import text_config
from avss_dist.models.size import Footprint
from avss_dist.runs.api import executor_for, overridden
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.reporter import Reporter, describe_repeated
from avss_dist.runs.run import PlannedRun
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A run that was not made.

    Attributes:
        model, corpus: the run's title, and the corpus as it was named.
        revision: the hub's commit, or the SHA-256 of the files.
        partition: the one that would be chosen.
        status: ``done``, ``partial`` (some shards are kept), ``missing``, ``repeated`` (the same as an earlier one,
            which warning names), or ``refused`` (error says why).
        weight_bytes: of the model in memory; None where its size is not known.
        num_tokens, num_shards, kept_shards: of the plan, and what of it is measured.
        seconds: what is left to measure may take, with all replicas; None where nothing is, or it cannot be estimated.
        warning: why it cannot be estimated, does not fit here or is not measured; else empty.
    """

    model: str
    corpus: str
    status: str
    revision: str = ""
    partition: str = ""
    weight_bytes: int | None = None
    num_tokens: int = 0
    num_shards: int = 0
    kept_shards: int = 0
    seconds: float | None = None
    warning: str = ""
    error: str | None = None


def preview_job(job: JobFile, *, reporter: Reporter | None = None, **options: Any) -> list[Preview]:
    """What `run_job` would do, from configurations, headers and a benchmark of a few layers; nothing is written.

    Args:
        reporter: notified of each run as its planning begins; a model that is benchmarked takes some seconds.
        options: as for `run_job`.

    Raises:
        AvssError: a mistake that concerns all runs, such as too few devices.
    """
    specs, execution = overridden(job, options)
    store = Store(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        previewer = _Previewer(Planner(executor, store, fetch=False), store)
        return [previewer.preview(spec, reporter or Reporter()) for spec in specs]


@dataclass
class _Previewer:
    """Previews runs; those of models with the same configuration and tokens are benchmarked once."""

    planner: Planner
    store: Store
    _measured: dict[Any, Arithmetic] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)  # of the first specs, by run id

    def preview(self, spec: RunSpec, reporter: Reporter) -> Preview:
        """One run."""
        reporter.planning(spec.name)
        try:
            planned = self.planner.prepare(spec)
            size = self.planner.size(spec, planned.replica_spec.checkpoint, planned.replica_spec.settings)
            kept = _kept(self.store, planned)
        except Exception as error:
            return Preview(model=spec.title, corpus=spec.corpus, status="refused", error=as_failure(error).message)
        shards, corpus = planned.corpus.shards, planned.corpus
        first = self._names.get(planned.run.run_id)
        self._names.setdefault(planned.run.run_id, spec.name)
        left = 0.0 if kept is None or first else 1 - kept / len(shards)
        seconds, warning = self._left(spec, planned, size, left) if left and size else (None, "")
        if first:
            warning = f"{spec.name} is {describe_repeated(first)}"
        return Preview(
            model=spec.title,
            corpus=spec.corpus,
            status="repeated" if first else "done" if kept is None else "partial" if kept else "missing",
            revision=planned.replica_spec.checkpoint.revision,
            partition=planned.replica_spec.placement.partition,
            weight_bytes=size.weight_bytes if size else None,
            num_tokens=corpus.num_tokens,
            num_shards=len(shards),
            kept_shards=kept or 0,
            seconds=seconds,
            warning=warning,
        )

    def _left(self, spec: RunSpec, planned: PlannedRun, size: Footprint, left: float) -> tuple[float | None, str]:
        """Seconds for a share of the run, and a warning."""
        try:
            row = self._row(spec, planned, size)
        except AvssError as error:
            return None, f"its time cannot be estimated here: {error.message}"
        replicas = 1 if planned.replica_spec.settings.device == "cpu" else planned.replicas  # CPUs are shared
        return left * row.seconds / replicas, "" if row.fits else f"it may not fit here: {row.why}"

    def _row(self, spec: RunSpec, planned: PlannedRun, size: Footprint) -> Row:
        checkpoint, settings = planned.replica_spec.checkpoint, planned.replica_spec.settings
        partition = planned.replica_spec.placement.partition
        config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code).to_json_string()
        key = config, planned.corpus.tokens_fingerprint, settings, partition, str(spec.execution)
        if key not in self._measured:
            weights = spec.model if checkpoint.source == "hub" else checkpoint
            self._measured[key] = measure(checkpoint, weights, size, spec.corpus, settings, spec.execution, partition)
        return self._measured[key].row(partition)


def _kept(store: Store, planned: PlannedRun) -> int | None:
    """Shards that are measured; None where the run is done."""
    if (store.run(planned.run.run_id) or {}).get("status") == "done":
        return None
    return sum(1 for _ in store.each_shard(planned.run.run_id, planned.expected))
