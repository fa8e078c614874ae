"""Preview of a job without loading a weight: its runs, their progress, and their estimated time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from avss_dist.core.errors import WarehouseError, as_failure
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.text import describe_bytes
from avss_dist.models.size import Footprint
from avss_dist.partition.memory import batch_bytes
from avss_dist.runs.api import executor_for, overridden
from avss_dist.runs.events import OnRunEvent, RunReading, RunRepeated
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import PlannedRun
from avss_dist.system.devices import Devices
from avss_dist.warehouse.store import Store

ALIKE = ("num_layers", "hidden_size", "num_parameters", "dtype", "partition")
COLUMNS = (*ALIKE, "run_id", "status", "device", "replicas", "tokens_per_second", "created_at")
"""Columns of ``runs`` that `speed_of_similar_run` reads."""


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
        seconds: estimated time of the missing shards, with all replicas; None if there are none, or no run of the same
            shape is finished.
        reference_run: id of the run whose speed the time is estimated from; else empty.
        warning: that the model may not fit here, or that the run is not measured; else empty.
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

    Times are those of the newest finished run of the warehouse with a model of the same shape.

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
    """Previews runs."""

    planner: Planner
    store: Store
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
        seconds, reference, warning = None, "", ""
        if share and size:
            seconds, reference = self._time(planned, size, share)
            warning = _missing_memory(planned, size, self.planner.executor.devices)
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

    def _time(self, planned: PlannedRun, size: Footprint, share: float) -> tuple[float | None, str]:
        """Return the seconds for a share of a run, and the run they are estimated from; None without one."""
        devices, replicas = self.planner.executor.devices, planned.replicas
        if devices.kind == "cpu":
            replicas = min(replicas, max(1, devices.cpus // planned.replica_spec.settings.threads))
        like = speed_of_similar_run(self._runs, size, planned.replica_spec.placement.partition, devices.kind)
        return (share * planned.corpus.num_tokens / like[0] / replicas, like[1]) if like else (None, "")

    @cached_property
    def _runs(self) -> list[dict[str, Any]]:
        """Finished runs of the warehouse; empty if there is no warehouse yet."""
        try:
            return self.store.table("runs", columns=COLUMNS).to_pylist()
        except WarehouseError:
            return []


def speed_of_similar_run(
    runs: Sequence[Mapping[str, Any]], size: Footprint, partition: str, device: str
) -> tuple[float, str] | None:
    """Return the tokens per second of each replica in the newest finished run of the same shape, and its run id.

    Args:
        runs: rows of ``runs`` with the `COLUMNS`.
        device: ``cpu`` or ``cuda``.
    """
    wanted = (size.num_layers, size.hidden_size, size.num_parameters, size.dtype, partition)
    for run in sorted(runs, key=lambda run: run["created_at"], reverse=True):
        alike = tuple(run[name] for name in ALIKE) == wanted and (run["device"] == "cpu") == (device == "cpu")
        if alike and run["status"] == "done" and run["tokens_per_second"]:
            return run["tokens_per_second"] / (run["replicas"] or 1), run["run_id"]
    return None


def _missing_memory(planned: PlannedRun, size: Footprint, devices: Devices) -> str:
    """Return a warning if the whole weights and the activations of a batch are larger than the memory of a device."""
    needed = size.weight_bytes + batch_bytes(size, planned.replica_spec.settings)
    if needed <= devices.device_bytes or not PARTITIONS[planned.replica_spec.placement.partition].whole:
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
