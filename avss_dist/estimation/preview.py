"""Preview of a job without loading a weight: its runs, their progress, and their estimated time."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from avss_dist.core.errors import WarehouseError, as_failure
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.estimation.speed import COLUMNS, multiplication_speed, run_seconds, speed_of_similar_run
from avss_dist.models.size import Footprint
from avss_dist.partition.choose import batch_bytes
from avss_dist.runs.api import executor_for, overridden
from avss_dist.runs.events import OnRunEvent, RunReading, RunRepeated
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import PlannedRun
from avss_dist.system.devices import Devices
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Preview of a run.

    Attributes:
        model, corpus: the run's title, and the corpus as it was named.
        revision: the hub's commit, or the SHA-256 of the files.
        partition: the partition that would be chosen.
        status: ``done``, ``partial`` (some shards are kept), ``missing``, ``repeated`` (the same as an earlier one,
            which warning names), or ``refused`` (error says why).
        weight_bytes: bytes of the model in memory; None if unknown.
        num_tokens, num_shards, kept_shards: tokens and shards of the plan, and shards that are measured already.
        seconds: estimated time of the missing shards, with all replicas; None if there are none, or the time cannot be
            estimated.
        reference_run: id of the run whose speed the time is estimated from; empty if the time is estimated from the
            number of operations.
        warning: why the time cannot be estimated, that the model may not fit here, or that the run is not measured;
            else empty.
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
    reference_run: str = ""
    warning: str = ""
    error: str | None = None


def preview_job(job: JobFile, on_event: OnRunEvent | None = None, **options: Any) -> list[Preview]:
    """Return what `run_job` would do, from configurations, headers and texts; nothing is written, no model is run.

    Times are estimates: from the newest finished run of the warehouse with a model of the same shape, or else from the
    arithmetic of the model and the speed at which this machine multiplies. `estimate` measures a model instead.

    Args:
        on_event: receives an event of each run as its planning begins.
        options: as for `run_job`.

    Raises:
        AvssError: a mistake that concerns all runs, such as too few devices.
    """
    specs, execution = overridden(job, options)
    store = Store(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        previewer = _Previewer(Planner(executor, store, fetch=False), store)
        return [previewer.preview(spec, on_event) for spec in specs]


@dataclass
class _Previewer:
    """Previews runs. The machine's speed of multiplication is measured once for models of the same shape."""

    planner: Planner
    store: Store
    _speeds: dict[Any, float] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)  # of the first specs, by run id

    def preview(self, spec: RunSpec, on_event: OnRunEvent | None) -> Preview:
        """Return the preview of a run."""
        if on_event is not None:
            on_event(RunReading(spec.name))
        try:
            planned = self.planner.prepare(spec)
            size = self.planner.size(spec, planned.replica_spec.checkpoint, planned.replica_spec.settings)
            num_kept = _num_kept_shards(self.store, planned)
        except Exception as error:
            return Preview(model=spec.title, corpus=spec.corpus, status="refused", error=as_failure(error).message)
        shards, corpus = planned.corpus.shards, planned.corpus
        first = self._names.get(planned.run.run_id)
        self._names.setdefault(planned.run.run_id, spec.name)
        share = 0.0 if num_kept is None or first else 1 - num_kept / len(shards)
        seconds, reference, warning = self._time(planned, size, share) if share and size else (None, "", "")
        if first:
            warning = f"{spec.name} is {RunRepeated(spec.name, first).describe()}"
        return Preview(
            model=spec.title,
            corpus=spec.corpus,
            status="repeated" if first else "done" if num_kept is None else "partial" if num_kept else "missing",
            revision=planned.replica_spec.checkpoint.revision,
            partition=planned.replica_spec.placement.partition,
            weight_bytes=size.weight_bytes if size else None,
            num_tokens=corpus.num_tokens,
            num_shards=len(shards),
            kept_shards=num_kept or 0,
            seconds=seconds,
            reference_run=reference,
            warning=warning,
        )

    def _time(self, planned: PlannedRun, size: Footprint, share: float) -> tuple[float | None, str, str]:
        """Return the seconds for a share of a run, the run they are estimated from, and a warning."""
        settings, placement = planned.replica_spec.settings, planned.replica_spec.placement
        devices = self.planner.executor.devices
        replicas = planned.replicas
        if devices.kind == "cpu":
            replicas = min(replicas, max(1, devices.cpus // settings.threads))
        if like := speed_of_similar_run(self._runs, size, placement.partition, devices.kind):
            return share * planned.corpus.num_tokens / like[0] / replicas, like[1], ""
        if not PARTITIONS[placement.partition].whole:
            return (
                None,
                "",
                f"the time with the partition {placement.partition} is unknown; avss estimate measures it",
            )
        key = size.hidden_size, size.mlp_width, size.dtype, settings
        if key not in self._speeds:
            self._speeds[key] = multiplication_speed(size, settings)
        seconds = run_seconds(size, settings, self._speeds[key], planned.corpus.num_sequences)
        return share * seconds / replicas, "", _missing_memory(size, settings, devices)

    @cached_property
    def _runs(self) -> list[dict[str, Any]]:
        """Finished runs of the warehouse; empty if there is no warehouse yet."""
        try:
            return self.store.table("runs", columns=COLUMNS).to_pylist()
        except WarehouseError:
            return []


def _missing_memory(size: Footprint, settings: Settings, devices: Devices) -> str:
    """Return a warning if the weights and the activations of a batch are larger than the memory of a device here."""
    needed = size.weight_bytes + batch_bytes(size, settings)
    if needed <= devices.device_bytes:
        return ""
    return (
        f"it may not fit here: {describe_bytes(needed)} of weights and activations, and "
        f"{describe_bytes(devices.device_bytes)} of memory"
    )


def _num_kept_shards(store: Store, planned: PlannedRun) -> int | None:
    """Return the number of measured shards; None if the run is done."""
    if (store.run(planned.run.run_id) or {}).get("status") == "done":
        return None
    return sum(1 for _ in store.each_shard(planned.run.run_id, planned.expected))
