"""Estimate of a run before any weight is loaded: memory and time of each partition on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from avss_dist.core.errors import without_secrets
from avss_dist.core.registry import PARTITIONS, WHOLE
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.estimation.benchmark import calibrate
from avss_dist.estimation.distillation import DistillRow, distillation_rows
from avss_dist.measure.shard import counter_bytes
from avss_dist.models.checkpoints import Checkpoint, fetch_files, locate
from avss_dist.models.size import Footprint, footprint
from avss_dist.partition.choose import PROCESS_BYTES, least_host_bytes
from avss_dist.partition.cost import Machine, PartitionCost, Usage
from avss_dist.partition.open import replica_class
from avss_dist.requests import EstimateRequest
from avss_dist.system.devices import pick_device

ABOUT_AS_FAST = 1.25  # times the seconds of the fastest
_TOKENIZER_FILES = ["config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Estimated memory and time of a run with one partition.

    Attributes:
        partition: one of ``registry.PARTITIONS``.
        ranks: processes of one replica.
        device_bytes: peak memory of each GPU or, on a CPU, of each process.
        host_bytes: peak memory of the host, all ranks together.
        fits: whether this memory is free here.
        seconds: time to measure all shards. Starting, opening the model and writing tables come on top.
        why: components of the numbers, or the missing memory.
    """

    partition: str
    ranks: int
    device_bytes: int
    host_bytes: int
    fits: bool
    seconds: float
    why: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(TabularResult):
    """Estimate of a run, with a row for each partition.

    Attributes:
        model, corpus: names in the request.
        num_sequences, num_tokens, num_shards: size of the tokenized corpus.
        num_parameters, num_layers, weight_bytes, dtype: size of the model; see `models.size.Footprint`.
        flops: floating-point operations of all forward passes; the language-model head does not run.
        device: ``cpu`` or ``cuda``.
        device_free_bytes, host_free_bytes: free memory of the fullest GPU, and of the host.
        rows: a row for each partition, the simplest first.
        distillation: a row for each way to distill the model; empty without a teacher.
    """

    model: str
    corpus: str
    num_sequences: int
    num_tokens: int
    num_shards: int
    num_parameters: int
    num_layers: int
    weight_bytes: int
    dtype: str
    flops: int
    device: str
    device_free_bytes: int
    host_free_bytes: int
    rows: tuple[Row, ...]
    distillation: tuple[DistillRow, ...] = ()

    @property
    def best(self) -> Row | None:
        """The simplest partition that fits and is about as fast as the fastest; None if none fits."""
        fitting = [row for row in self.rows if row.fits]
        fastest = min((row.seconds for row in fitting), default=0.0)
        return next((row for row in fitting if row.seconds <= ABOUT_AS_FAST * fastest), None)

    def table(self) -> pa.Table:
        """Return a table with a row for each partition."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def summary(self) -> str:
        """Return the model, and its layers and tokens, in a line."""
        return f"{self.model}, {self.num_layers} layers, {self.num_tokens:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON-ready values."""
        values = {**asdict(self), "rows": [asdict(row) for row in self.rows]}
        values["distillation"] = [asdict(row) for row in self.distillation]
        return values if self.distillation else {name: values[name] for name in values if name != "distillation"}


def estimate(request: EstimateRequest) -> Estimate:
    """Estimate a run from the checkpoint's configuration and headers, the corpus, and a benchmark of some seconds.

    Weights are neither fetched nor read. The estimate is of one replica.

    Raises:
        AvssError: the model, the corpus or a setting is not one that can be run.
    """
    model, corpus, settings = str(request.model), request.corpus, request.settings
    checkpoint = locate(model, trust_remote_code=settings.trust_remote_code)
    size = footprint(checkpoint or model, settings)
    source = checkpoint or _fetch_tokenizer(model, settings)
    settings = replace(settings, dtype=size.dtype, device=pick_device(settings.device).type)
    machine = Machine.look(settings.device, request.max_memory)
    distillation: tuple[DistillRow, ...] = ()
    if request.teacher:
        distillation = tuple(distillation_rows(checkpoint or model, request, settings, machine))
    costs = partition_costs(checkpoint or model, size, settings, machine, request)
    timed = {cost.partition: cost.timed_limits for cost in costs if cost.partition == WHOLE or cost.is_timed()}
    measured = calibrate(source, corpus, settings, size, timed)
    counters = counter_bytes(size, settings, measured.num_strata)
    return Estimate(
        model=model,
        corpus=without_secrets(corpus),
        num_sequences=measured.num_sequences,
        num_tokens=measured.num_tokens,
        num_shards=measured.num_shards,
        num_parameters=size.num_parameters,
        num_layers=size.num_layers,
        weight_bytes=size.weight_bytes,
        dtype=size.dtype,
        flops=size.forward_flops(measured.num_sequences, settings.sequence_length),
        device=machine.device,
        device_free_bytes=machine.device_free,
        host_free_bytes=machine.host_free,
        rows=tuple(row(cost, cost.usage(measured, counters)) for cost in costs),
        distillation=distillation,
    )


def partition_costs(
    weights: Checkpoint | str, size: Footprint, settings: Settings, machine: Machine, request: EstimateRequest
) -> list[PartitionCost]:
    """Return memory and time of every partition, the simplest first; see `partition.cost.PartitionCost`."""
    limits = request.ranks, request.max_memory
    return [replica_class(name).cost(name, weights, size, settings, *limits, machine) for name in PARTITIONS]


def row(cost: PartitionCost, usage: Usage) -> Row:
    """Return the row of a partition: its memory and time, and whether it fits."""
    machine = cost.machine
    host_needed = usage.host_bytes
    if "cpu" in cost.max_memory:  # a run is refused by this rule, before anything can be measured
        host_needed = max(host_needed, least_host_bytes(cost.partition, cost.size, cost.settings, machine.device))
    needs = [(host_needed, machine.host_free, "host memory")]
    if cost.on_gpu:
        needs.append((usage.device_bytes, machine.device_free, "GPU memory"))
    lacks = [f"lacks {describe_bytes(need - free)} of {memory}" for need, free, memory in needs if need > free]
    if lacks and host_needed > usage.host_bytes:
        lacks.append(f"{describe_bytes(PROCESS_BYTES)} of a limit are set aside for interpreter and libraries")
    if cost.obstacle:
        lacks.append(cost.obstacle)
    if cost.on_gpu and cost.ranks > machine.gpus:
        lacks.append(f"{cost.ranks} GPUs are needed, {machine.gpus} are here")
    return Row(
        partition=cost.partition,
        ranks=cost.ranks,
        device_bytes=usage.device_bytes,
        host_bytes=usage.host_bytes,
        fits=not lacks,
        seconds=usage.seconds,
        why="; ".join([*lacks, usage.why]),
    )


def _fetch_tokenizer(model: str, settings: Settings) -> Checkpoint:
    return fetch_files(model, _TOKENIZER_FILES + (["*.py"] if settings.trust_remote_code else []))
