"""Preview of a job without loading a weight: its runs, their progress, and their estimated time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

from avss_dist.core.errors import WarehouseError, as_failure
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.text import describe_bytes
from avss_dist.models.size import Footprint
from avss_dist.partition.memory import batch_bytes
from avss_dist.runs.events import OnRunEvent, RunReading, RunRepeated
from avss_dist.runs.job_file import JobFile
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import PlannedRun
from avss_dist.runs.scoring import executor_for, overridden
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
    """Return what `run_job` would do, from configurations, headers and texts. Nothing is written, no model is run.

    Times are those of the newest finished run of the warehouse with a model of the same shape.

    Args:
        on_event: receives an event of each run as its planning begins.
        options: as for `run_job`.

    Raises:
        AvssError: a mistake that concerns all runs, such as too few devices.
    """
    specs, execution = overridden(job, options)
    store, previews = Store(job.warehouse), list[Preview]()
    names: dict[str, str] = {}  # of the first specs, by run id
    finished: list[dict[str, Any]] = []
    with suppress(WarehouseError):  # there is none yet
        finished = store.table("runs", columns=COLUMNS).to_pylist()
    with closing(executor_for(specs, job.settings, execution)) as executor:
        planner = Planner(executor, store, fetch=False)
        for spec in specs:
            if on_event is not None:
                on_event(RunReading(spec.name))
            try:
                planned = planner.prepare(spec)
                size = planner.size(spec, planned.replica_spec.checkpoint, planned.replica_spec.settings)
                done = (store.run(planned.run.run_id) or {}).get("status") == "done"
                kept = 0 if done else sum(1 for _ in store.each_shard(planned.run.run_id, planned.expected))
            except Exception as error:
                refused = as_failure(error).message
                previews.append(Preview(model=spec.title, corpus=spec.corpus, status="refused", error=refused))
                continue
            first = names.get(planned.run.run_id)
            names.setdefault(planned.run.run_id, spec.name)
            preview = Preview(
                model=spec.title,
                corpus=spec.corpus,
                status="done" if done else "partial" if kept else "missing",
                revision=planned.replica_spec.checkpoint.revision,
                partition=planned.replica_spec.placement.partition,
                weight_bytes=size.weight_bytes if size else None,
                num_tokens=planned.corpus.num_tokens,
                num_shards=len(planned.corpus.shards),
                kept_shards=kept,
            )
            if first:
                repeated = f"{spec.name} is {RunRepeated(spec.name, first).describe()}"
                preview = replace(preview, status="repeated", warning=repeated)
            elif size and not done and kept < preview.num_shards:
                preview = _with_time(preview, planned, size, executor.devices, finished)
            previews.append(preview)
    return previews


def _with_time(
    preview: Preview, planned: PlannedRun, size: Footprint, devices: Devices, runs: Sequence[Mapping[str, Any]]
) -> Preview:
    """Return a preview with the time of the missing shards, and with a warning if the memory may be too small."""
    settings, replicas = planned.replica_spec.settings, planned.replicas
    if devices.kind == "cpu":
        replicas = min(replicas, max(1, devices.cpus // settings.threads))
    if like := speed_of_similar_run(runs, size, preview.partition, devices.kind):
        share = 1 - preview.kept_shards / preview.num_shards
        seconds = share * preview.num_tokens / like[0] / replicas
        preview = replace(preview, seconds=seconds, reference_run=like[1])
    needed = size.weight_bytes + batch_bytes(size, settings)
    if needed <= devices.device_bytes or not PARTITIONS[preview.partition].whole:
        return preview
    warning = (
        f"it may not fit here: {describe_bytes(needed)} of weights and activations, and "
        f"{describe_bytes(devices.device_bytes)} of memory"
    )
    return replace(preview, warning=warning)


def speed_of_similar_run(
    runs: Sequence[Mapping[str, Any]], size: Footprint, partition: str, device: str
) -> tuple[float, str] | None:
    """Return the tokens per second of each replica in the newest finished run of the same shape, and its run id.

    Args:
        runs: rows of ``runs`` with the `COLUMNS`.
        device: ``cpu`` or ``cuda``.
    """
    shape = (size.num_layers, size.hidden_size, size.num_parameters, size.dtype, partition)
    for run in sorted(runs, key=lambda run: run["created_at"], reverse=True):
        alike = tuple(run[name] for name in ALIKE) == shape and (run["device"] == "cpu") == (device == "cpu")
        if alike and run["status"] == "done" and run["tokens_per_second"]:
            return run["tokens_per_second"] / (run["replicas"] or 1), run["run_id"]
    return None
