"""Before a weight is loaded: the memory of a run or a distillation, and the preview of a job with its times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec

import pyarrow as pa

from avss_dist.core.devices import Devices, devices_here, pick_device
from avss_dist.core.errors import ConfigError, as_failure
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.core.values import NewObject, TableRow
from avss_dist.distillation.memory import LIBRARIES, estimate_memory
from avss_dist.distillation.pair import LORA, computes_in_bfloat16
from avss_dist.models.checkpoint.locate import Checkpoint, find_checkpoint
from avss_dist.models.checkpoint.size import Footprint, footprint, sharing_skeletons
from avss_dist.partition.catalog import PARTITIONS, SHARDINGS
from avss_dist.partition.choose import choose
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate, batch_bytes
from avss_dist.partition.execution import Execution
from avss_dist.partition.replica import replica_class
from avss_dist.pruning.repair.costs import RepairCost, repair_cost
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.requests import TRAINED, DistillRequest, EstimateRequest
from avss_dist.runs.events import OnRunEvent, RunReading, describe_repeated
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.past_speed import finished_rows, replica_speed, run_of_shape
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.planner import Planner, rows_per_shard
from avss_dist.runs.scoring import executor_for, overridden
from avss_dist.runs.stored import StoredRun, look_up_run
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
        settings: of the request, with the kind of device. ``batch_size`` is the rows of a training step on each rank.

    Raises:
        ModelError: a model cannot be read or built.
    """
    teacher = find_checkpoint(str(request.teacher), trust_remote_code=settings.trust_remote_code)
    ranks = request.ranks or max(2, devices.count)
    teacher_dtype = "bfloat16" if computes_in_bfloat16(request.settings, settings.device) else "float32"
    pair = DistilledPair(student=student, teacher=teacher, settings=settings, teacher_dtype=teacher_dtype)
    for train in TRAINED:
        if train == LORA and find_spec("peft") is None:
            continue
        yield _distillation_row(pair, devices, train=train, sharding="", ranks=1)
        for sharding in SHARDINGS:
            yield _distillation_row(pair, devices, train=train, sharding=sharding, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class DistilledPair:
    """Student and teacher of a distillation whose memory is estimated.

    Attributes:
        settings: settings of a training step on each rank.
        teacher_dtype: precision in which the teacher computes. The student's weights are in float32.
    """

    student: Checkpoint
    teacher: Checkpoint
    settings: Settings
    teacher_dtype: str


def _distillation_row(pair: DistilledPair, devices: Devices, *, train: str, sharding: str, ranks: int) -> DistillRow:
    """Return the memory of one way to distill a model."""
    memory = estimate_memory(
        pair.student,
        pair.teacher,
        replace(pair.settings, dtype="float32"),
        replace(pair.settings, dtype=pair.teacher_dtype),
        train=train,
        rank=DistillRequest.lora_rank,
        sharding=sharding or next(iter(SHARDINGS)),
        ranks=ranks,
    )
    needed = memory.total
    parts = dict(memory.parts)
    if devices.kind == "cpu":
        needed += LIBRARIES
        parts["libraries"] = LIBRARIES
        fits = ranks * needed <= devices.host_bytes
    else:
        fits = needed <= devices.device_bytes and ranks <= devices.count
    return DistillRow(
        train=train,
        sharding=sharding,
        ranks=ranks,
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
        repair: text and memory of the fit of a repair; None without one.
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
    repair: RepairCost | None = None

    def table(self) -> pa.Table:
        """Return a table with a row for each partition."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def summary(self) -> str:
        """Return the model and its layers in a line."""
        return f"{self.model}, {self.num_layers} layers"

    def as_dict(self) -> NewObject:
        """Return the estimate as JSON-ready values."""
        return asdict(self)


@sharing_skeletons()
def estimate(request: EstimateRequest) -> Estimate:
    """Estimate the memory of a replica with every partition, from a checkpoint's configuration and headers.

    Raises:
        AvssError: the model or a setting is not one that can be run.
    """
    checkpoint = find_checkpoint(
        str(request.model), trust_remote_code=request.settings.trust_remote_code, weights=False
    )
    settings = replace(request.settings, device=pick_device(request.settings.device).type)
    size = footprint(checkpoint, settings)
    rows = settings.sequences_per_shard
    if rows is None:
        rows = rows_per_shard(size, settings, settings.max_sequences or ENOUGH_ROWS)
    settings = replace(settings, dtype=size.dtype, sequences_per_shard=rows)

    present = devices_here(settings.device)
    devices = _limited(present, request.max_memory)
    auto, auto_why = _automatic_partition(size, settings, request, present)
    distillation: list[DistillRow] = []
    if request.teacher:
        distillation = list(distillation_rows(checkpoint, request, settings, devices))
    repair = None
    if request.repair != NO_REPAIR:
        repair = repair_cost(checkpoint, request.repair, settings)
    return Estimate(
        model=str(request.model),
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
        auto_why=auto_why,
        distillation=tuple(distillation),
        repair=repair,
    )


def _limited(devices: Devices, max_memory: Mapping[str, int]) -> Devices:
    """Return devices with no more memory than the limits say: ``cpu`` for the host, other names for GPUs."""
    host_bytes = min(devices.host_bytes, max_memory.get("cpu", devices.host_bytes))
    device_bytes = devices.device_bytes
    for name, limit in max_memory.items():
        if name != "cpu":
            device_bytes = min(device_bytes, limit)
    if devices.kind == "cpu":
        device_bytes = host_bytes
    return replace(devices, host_bytes=host_bytes, device_bytes=device_bytes)


def _automatic_partition(
    size: Footprint, settings: Settings, request: EstimateRequest, devices: Devices
) -> tuple[str, str]:
    """Return the partition that a run chooses by itself, and why. It is empty if the model is refused."""
    try:
        placement = choose(size, settings, Execution(max_memory=request.max_memory), devices)
    except ConfigError as error:
        return "", f"{error.message} {error.hint}".replace("`", "").strip()
    if placement.gpus > 1:
        return placement.partition, f"{placement.why}; over {placement.gpus} GPUs"
    return placement.partition, placement.why


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
    for ranks in _possible_ranks(partition, request, devices):
        query = MemoryQuery(
            partition=partition,
            checkpoint=checkpoint,
            size=size,
            settings=settings,
            ranks=ranks,
            max_memory=request.max_memory,
            devices=devices,
        )
        usage = replica.usage(query)
        obstacle = replica.obstacle(query)
        if usage.device_bytes <= devices.device_bytes or obstacle:
            break
    reasons = []
    if usage.host_bytes > devices.host_bytes:
        reasons.append(f"lacks {describe_bytes(usage.host_bytes - devices.host_bytes)} of host memory")
    if query.on_gpu and usage.device_bytes > devices.device_bytes:
        reasons.append(f"lacks {describe_bytes(usage.device_bytes - devices.device_bytes)} of GPU memory")
    if obstacle:
        reasons.append(obstacle)
    if usage.gpus > devices.count:
        reasons.append(f"{usage.gpus} GPUs are needed, {devices.count} are here")
    return replace(usage, fits=not reasons, why="; ".join([*reasons, usage.why]))


def _possible_ranks(partition: str, request: EstimateRequest, devices: Devices) -> Sequence[int]:
    """Return the numbers of ranks of a replica to try, in order."""
    if not PARTITIONS[partition].gang:
        return [1]
    if request.ranks:
        return [request.ranks]
    if devices.kind == "cuda":
        return RANKS
    return RANKS[:1]


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


def preview_job(job: JobFile, on_event: OnRunEvent | None = None, **options: object) -> list[Preview]:
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
    finished = finished_rows(store.reader)
    previews: list[Preview] = []
    first_names: dict[str, str] = {}  # name of the first run with an id, by that
    with closing(executor_for(specs, job.settings, execution)) as executor:
        planner = Planner(executor, store, fetch=False)
        for spec in specs:
            if on_event is not None:
                on_event(RunReading(spec.name))
            try:
                stored = look_up_run(planner, store, spec)
            except Exception as error:
                message = as_failure(error).message
                previews.append(Preview(model=spec.title, corpus=spec.corpus, status="refused", error=message))
                continue
            preview = _preview(spec, stored)
            first_name = first_names.get(stored.planned.run_id)
            if first_name is not None:
                warning = f"{spec.name} is {describe_repeated(first_name)}"
                preview = replace(preview, status="repeated", warning=warning)
            else:
                first_names[stored.planned.run_id] = spec.name
                if stored.size and not stored.is_done and stored.num_kept < preview.num_shards:
                    preview = _with_time(preview, stored.planned, stored.size, executor.devices, finished)
            previews.append(preview)
    return previews


def _preview(spec: RunSpec, stored: StoredRun) -> Preview:
    """Return the preview of a run, without a time."""
    status = "missing"
    if stored.is_done:
        status = "done"
    elif stored.num_kept:
        status = "partial"
    planned = stored.planned
    return Preview(
        model=spec.title,
        corpus=spec.corpus,
        status=status,
        revision=planned.replica_spec.checkpoint.revision,
        partition=planned.replica_spec.placement.partition,
        weight_bytes=stored.size.weight_bytes if stored.size else None,
        num_tokens=planned.corpus.num_tokens,
        num_shards=len(planned.corpus.shards),
        kept_shards=stored.num_kept,
    )


def _with_time(
    preview: Preview, planned: PlannedRun, size: Footprint, devices: Devices, finished: Sequence[TableRow]
) -> Preview:
    """Return a preview with the time of the missing shards, and with a warning if the memory may be too small.

    Args:
        finished: rows of finished ``runs``, newest first. The time is that of the first with a model of the same shape.
    """
    replicas = planned.replicas
    if devices.kind == "cpu":
        replicas = min(replicas, max(1, devices.cpus // planned.replica_spec.settings.threads))
    run_row = run_of_shape(finished, size, preview.partition, devices.kind)
    if run_row is not None:
        missing_share = 1 - preview.kept_shards / preview.num_shards
        seconds = missing_share * preview.num_tokens / replica_speed(run_row) / replicas
        preview = replace(preview, seconds=seconds, reference_run=run_row["run_id"])
    needed = size.weight_bytes + batch_bytes(size, planned.replica_spec.settings)
    if needed <= devices.device_bytes or not PARTITIONS[preview.partition].whole:
        return preview
    warning = (
        f"it may not fit here: {describe_bytes(needed)} of weights and activations, and "
        f"{describe_bytes(devices.device_bytes)} of memory"
    )
    return replace(preview, warning=warning)
