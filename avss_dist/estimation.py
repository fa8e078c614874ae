"""Before a weight is loaded: the memory of a run or a distillation, and the preview of a job with its times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.core.devices import Devices, devices_here, pick_device
from avss_dist.core.errors import ConfigError, WarehouseError, as_failure
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.distillation.memory import LIBRARIES, estimate_memory
from avss_dist.distillation.pair import LORA, computes_in_bfloat16
from avss_dist.models.checkpoint.locate import Checkpoint, find_checkpoint
from avss_dist.models.checkpoint.size import Footprint, footprint, sharing_skeletons
from avss_dist.partition.catalog import PARTITIONS, SHARDINGS
from avss_dist.partition.choose import choose, size_of
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate, batch_bytes
from avss_dist.partition.execution import Execution
from avss_dist.partition.replica import replica_class
from avss_dist.requests import TRAINED, DistillRequest, EstimateRequest, require_divisible
from avss_dist.runs.events import OnRunEvent, RunReading, describe_repeated
from avss_dist.runs.job_file import JobFile
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.planner import Planner, rows_per_shard
from avss_dist.runs.scoring import executor_for, overridden
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, kw_only=True)
class DistillRow:
    """Estimated memory of a distillation.

    Attributes:
        train: weights that are trained.
        sharding: parts that are divided among ranks, a name of `partition.catalog.SHARDINGS`; empty for one process.
        ranks: number of processes.
        trained: number of trained parameters.
        device_bytes: peak memory of each GPU or, on a CPU, of each process.
        fits: whether this memory is here.
        why: components of the memory.
    """

    train: str
    sharding: str
    ranks: int
    trained: int
    device_bytes: int
    fits: bool
    why: str


def distillation_rows(
    student: Checkpoint, request: EstimateRequest, settings: Settings, devices: Devices
) -> Iterator[DistillRow]:
    """Yield the memory of each way to distill a model that is possible here.

    Args:
        settings: of the request, with the kind of device.

    Raises:
        ConfigError: the rows of a training step cannot be divided among the ranks.
        ModelError: a model cannot be read or built.
    """
    teacher = find_checkpoint(str(request.teacher), trust_remote_code=settings.trust_remote_code)
    ranks = request.ranks or max(2, devices.count)
    require_divisible(settings.batch_size, ranks)
    dtype = "bfloat16" if computes_in_bfloat16(request.settings, settings.device) else "float32"
    for train in TRAINED:
        if train == LORA and find_spec("peft") is None:
            continue
        for sharding, processes in (("", 1), *((name, ranks) for name in SHARDINGS)):
            rows = replace(settings, batch_size=settings.batch_size // processes)
            memory = estimate_memory(
                student,
                teacher,
                replace(rows, dtype="float32"),
                replace(rows, dtype=dtype),
                train=train,
                rank=DistillRequest.lora_rank,
                sharding=sharding or next(iter(SHARDINGS)),
                ranks=processes,
            )
            needed, parts = memory.total, {**memory.parts}
            fits = needed <= devices.device_bytes and processes <= devices.count
            if devices.kind == "cpu":
                needed, parts = needed + LIBRARIES, {**parts, "libraries": LIBRARIES}
                fits = processes * needed <= devices.host_bytes
            yield DistillRow(
                train=train,
                sharding=sharding,
                ranks=processes,
                trained=memory.trained,
                device_bytes=needed,
                fits=fits,
                why=", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items()),
            )


ENOUGH_ROWS = 1 << 20  # of a text, for shards of the usual size
RANKS = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of ranks on GPUs, of which the first whose part fits is estimated."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(TabularResult):
    """Estimate of a run, with a row for each partition.

    Attributes:
        model: name in the request.
        num_parameters, num_layers, weight_bytes, dtype: size of the model; see `models.checkpoint.size.Footprint`.
        device: ``cpu`` or ``cuda``.
        device_bytes, host_bytes: memory of the smallest GPU, or of the host, and of the host, within the limits.
        quantized: whether weights stay quantized where the partition computes with them as stored.
        rows: a row for each partition, the simplest first.
        auto: partition that a run chooses with ``auto``; empty if it is refused.
        auto_why: reason of the choice or of the refusal, for people.
        distillation: a row for each way to distill the model; empty without a teacher.
    """

    model: str
    num_parameters: int
    num_layers: int
    weight_bytes: int
    dtype: str
    device: str
    device_bytes: int
    host_bytes: int
    rows: tuple[PartitionEstimate, ...]
    auto: str
    auto_why: str
    quantized: bool
    distillation: tuple[DistillRow, ...] = ()

    def table(self) -> pa.Table:
        """Return a table with a row for each partition."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def summary(self) -> str:
        """Return the model and its layers in a line."""
        return f"{self.model}, {self.num_layers} layers"

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON-ready values."""
        return asdict(self)


@sharing_skeletons()
def estimate(request: EstimateRequest) -> Estimate:
    """Estimate the memory of a replica with every partition, from a checkpoint's configuration and headers.

    Raises:
        AvssError: the model or a setting is not one that can be run.
    """
    settings, model = request.settings, str(request.model)
    checkpoint = find_checkpoint(model, trust_remote_code=settings.trust_remote_code, weights=False)
    settings = replace(settings, device=pick_device(settings.device).type)
    size = footprint(checkpoint, settings)
    rows = settings.sequences_per_shard or rows_per_shard(size, settings, settings.max_sequences or ENOUGH_ROWS)
    settings = replace(settings, dtype=size.dtype, sequences_per_shard=rows)
    here = devices_here(settings.device)
    host = min(here.host_bytes, request.max_memory.get("cpu", here.host_bytes))
    gpus = [here.device_bytes, *(limit for name, limit in request.max_memory.items() if name != "cpu")]
    devices = replace(here, host_bytes=host, device_bytes=host if here.kind == "cpu" else min(gpus))
    try:
        placement = choose(size, settings, Execution(max_memory=request.max_memory), here)
        auto, why = placement.partition, placement.why
        why += f"; over {placement.gpus} GPUs" if placement.gpus > 1 else ""
    except ConfigError as error:
        auto, why = "", f"{error.message} {error.hint}".replace("`", "").strip()
    return Estimate(
        model=model,
        num_parameters=size.num_parameters,
        num_layers=size.num_layers,
        weight_bytes=size.weight_bytes,
        dtype=size.dtype,
        quantized=size.quantized,
        device=devices.kind,
        device_bytes=devices.device_bytes,
        host_bytes=devices.host_bytes,
        rows=tuple(_row(partition, checkpoint, size, settings, devices, request) for partition in PARTITIONS),
        auto=auto,
        auto_why=why,
        distillation=tuple(distillation_rows(checkpoint, request, settings, devices)) if request.teacher else (),
    )


def _row(
    partition: str,
    checkpoint: Checkpoint,
    size: Footprint,
    settings: Settings,
    devices: Devices,
    request: EstimateRequest,
) -> PartitionEstimate:
    """Return the row of a partition. A gang has the requested ranks, or as few as have room for their parts."""
    replica = replica_class(partition)
    numbers: tuple[int, ...] = (1,)
    if PARTITIONS[partition].gang:
        numbers = (request.ranks,) if request.ranks else RANKS if devices.kind == "cuda" else RANKS[:1]
    for ranks in numbers:
        query = MemoryQuery(
            partition=partition,
            checkpoint=checkpoint,
            size=size,
            settings=settings,
            ranks=ranks,
            max_memory=request.max_memory,
            devices=devices,
        )
        usage, obstacle = replica.usage(query), replica.obstacle(query)
        if usage.device_bytes <= devices.device_bytes or obstacle:
            break
    missing = [("host memory", usage.host_bytes - devices.host_bytes)]
    missing += [("GPU memory", usage.device_bytes - devices.device_bytes)] if query.on_gpu else []
    reasons = [
        *(f"lacks {describe_bytes(excess)} of {name}" for name, excess in missing if excess > 0),
        *([obstacle] if obstacle else []),
        *([f"{usage.gpus} GPUs are needed, {devices.count} are here"] if usage.gpus > devices.count else []),
    ]
    return replace(usage, fits=not reasons, why="; ".join([*reasons, usage.why]))


_SHAPE = ("num_layers", "hidden_size", "num_parameters", "dtype")
_SPEED = ("run_id", "partition", "device", "replicas", "tokens_per_second", "created_at")


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
    store = Store(job.warehouse)
    previews: list[Preview] = []
    names: dict[str, str] = {}  # of the first specs, by run id
    runs: list[dict[str, Any]] = []
    with suppress(WarehouseError):  # there is none yet
        measured = (pc.field("status") == "done") & (pc.field("tokens_per_second") > 0)
        finished = store.reader.table("runs", columns=[*_SHAPE, *_SPEED], where=measured)
        runs = finished.sort_by([("created_at", "descending")]).to_pylist()
    with closing(executor_for(specs, job.settings, execution)) as executor:
        planner = Planner(executor, store, fetch=False)
        for spec in specs:
            if on_event is not None:
                on_event(RunReading(spec.name))
            try:
                planned = planner.prepare(spec)
                size = size_of(planned.replica_spec.checkpoint, planned.replica_spec.settings)
                done = (store.reader.readable_run(planned.run_id) or {}).get("status") == "done"
                num_kept = 0 if done else sum(1 for _ in store.reader.each_shard(planned.run_id, planned.expected))
            except Exception as error:
                previews.append(
                    Preview(model=spec.title, corpus=spec.corpus, status="refused", error=as_failure(error).message)
                )
                continue
            first = names.get(planned.run_id)
            names.setdefault(planned.run_id, spec.name)
            preview = Preview(
                model=spec.title,
                corpus=spec.corpus,
                status="done" if done else "partial" if num_kept else "missing",
                revision=planned.replica_spec.checkpoint.revision,
                partition=planned.replica_spec.placement.partition,
                weight_bytes=size.weight_bytes if size else None,
                num_tokens=planned.corpus.num_tokens,
                num_shards=len(planned.corpus.shards),
                kept_shards=num_kept,
            )
            if first:
                preview = replace(preview, status="repeated", warning=f"{spec.name} is {describe_repeated(first)}")
            elif size and not done and num_kept < preview.num_shards:
                preview = _with_time(preview, planned, size, executor.devices, runs)
            previews.append(preview)
    return previews


def _with_time(
    preview: Preview, planned: PlannedRun, size: Footprint, devices: Devices, runs: Sequence[Mapping[str, Any]]
) -> Preview:
    """Return a preview with the time of the missing shards, and with a warning if the memory may be too small.

    Args:
        runs: rows of finished ``runs``, newest first. The time is that of the first with a model of the same shape.
    """
    settings, replicas = planned.replica_spec.settings, planned.replicas
    if devices.kind == "cpu":
        replicas = min(replicas, max(1, devices.cpus // settings.threads))
    shape = {name: getattr(size, name) for name in _SHAPE}
    for run in runs:
        same_device = (run["device"] == "cpu") == (devices.kind == "cpu")
        if same_device and run["partition"] == preview.partition and shape.items() <= run.items():
            share = 1 - preview.kept_shards / preview.num_shards
            seconds = share * preview.num_tokens / (run["tokens_per_second"] / (run["replicas"] or 1)) / replicas
            preview = replace(preview, seconds=seconds, reference_run=run["run_id"])
            break
    needed = size.weight_bytes + batch_bytes(size, settings)
    if needed <= devices.device_bytes or not PARTITIONS[preview.partition].whole:
        return preview
    return replace(
        preview,
        warning=f"it may not fit here: {describe_bytes(needed)} of weights and activations, and "
        f"{describe_bytes(devices.device_bytes)} of memory",
    )
