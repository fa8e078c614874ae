"""Estimate of a run before any weight is loaded: memory and time of each partition, here or on other hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from avss_dist.core.errors import ConfigError, without_secrets
from avss_dist.core.registry import PARTITIONS, WHOLE
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import describe_bytes
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.estimation.benchmark import calibrate
from avss_dist.estimation.distillation import DistillRow, distillation_rows
from avss_dist.estimation.on_paper import calibrate_on_paper
from avss_dist.measure.shard import counter_bytes
from avss_dist.models.checkpoints import Checkpoint, fetch_files, locate
from avss_dist.models.loading import load_tokenizer
from avss_dist.models.size import Footprint, footprint, sharing_skeletons
from avss_dist.partition.choose import PROCESS_BYTES, choose, least_host_bytes
from avss_dist.partition.cost import Calibration, Machine, PartitionCost, Usage
from avss_dist.partition.open import replica_class
from avss_dist.requests import EstimateRequest
from avss_dist.runs.shard_size import split_into_shards
from avss_dist.system.devices import pick_device

ABOUT_AS_FAST = 1.25  # times the seconds of the fastest
_TOKENIZER_FILES = ["config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Estimated memory and time of a run with one partition.

    Attributes:
        partition: one of ``registry.PARTITIONS``.
        ranks: processes of one replica.
        gpus: GPUs of one replica; 0 on a CPU.
        replicas: number of replicas that the GPUs have room for at once; 1 on a CPU.
        device_bytes: peak memory of each GPU or, on a CPU, of each process.
        host_bytes: peak memory of the host, all its ranks together.
        exchanged_bytes: bytes that a rank receives for a layer while a shard is measured, from other ranks, other
            devices, host memory or files; the mean over layers.
        fits: whether this memory is free here, and nothing else is in the way.
        seconds: time in which one replica measures all shards. Starting, opening the model and writing tables come on
            top.
        shard_seconds: the same for a shard, the mean over shards.
        why: components of the numbers, or the missing memory.
    """

    partition: str
    ranks: int
    gpus: int
    replicas: int
    device_bytes: int
    host_bytes: int
    exchanged_bytes: int
    fits: bool
    seconds: float
    shard_seconds: float
    why: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(TabularResult):
    """Estimate of a run, with a row for each partition.

    Attributes:
        model, corpus: names in the request; no corpus if the number of rows is assumed.
        hardware: hardware that is not at hand, such as ``4x8xH100``; empty for this machine.
        num_sequences, num_tokens, num_shards: size of the tokenized corpus.
        num_parameters, num_layers, weight_bytes, dtype: size of the model; see `models.size.Footprint`.
        flops: floating-point operations of all forward passes; the language-model head does not run.
        device: ``cpu`` or ``cuda``.
        device_free_bytes, host_free_bytes: free memory of the fullest GPU, and of the host.
        rows_per_shard: rows of every shard but the last.
        quantized: whether weights stay quantized where the partition computes with them as stored.
        rows: a row for each partition, the simplest first.
        auto: partition that a run chooses with ``auto``; empty if it is refused.
        auto_why: reason of the choice or of the refusal, for people.
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
    rows_per_shard: int
    auto: str
    auto_why: str
    hardware: str = ""
    quantized: bool = False
    distillation: tuple[DistillRow, ...] = ()

    @property
    def best(self) -> Row | None:
        """The simplest partition that fits and is about as fast as the fastest; None if none fits."""
        fitting = [row for row in self.rows if row.fits]
        fastest = min((row.seconds / row.replicas for row in fitting), default=0.0)
        return next((row for row in fitting if row.seconds / row.replicas <= ABOUT_AS_FAST * fastest), None)

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

    Weights are neither fetched nor read. The estimate is of one replica. For hardware that is not at hand, published
    peak numbers take the place of the benchmark, and a configuration alone is enough.

    Raises:
        AvssError: the model, the corpus or a setting is not one that can be run.
    """
    with sharing_skeletons():
        return _estimate(request)


def _estimate(request: EstimateRequest) -> Estimate:
    model, settings = str(request.model), request.settings
    on_paper = request.hardware is not None
    checkpoint = locate(model, trust_remote_code=settings.trust_remote_code, weights=not on_paper)
    weights = checkpoint or model
    if request.hardware is not None:
        if settings.device == "cpu":
            raise ConfigError("`hardware` names GPUs, and `device` is cpu.", "Leave out one of them.")
        settings, machine = replace(settings, device="cuda"), Machine.of_hardware(request.hardware, request.max_memory)
    else:
        settings = replace(settings, device=pick_device(settings.device).type)
        machine = Machine.look(settings.device, request.max_memory)
    size = footprint(weights, settings)
    settings = replace(settings, dtype=size.dtype)
    distillation: tuple[DistillRow, ...] = ()
    if request.teacher:
        distillation = tuple(distillation_rows(weights, request, settings, machine))
    costs = partition_costs(weights, size, settings, machine, request)
    measured = _calibration(checkpoint, size, settings, costs, request)
    rows = [_fitting_row(alternatives, measured) for alternatives in costs.values()]
    auto, why = _automatic(size, settings, machine, request)
    return Estimate(
        model=model,
        hardware=str(request.hardware or ""),
        corpus=without_secrets(request.corpus or ""),
        num_sequences=measured.num_sequences,
        num_tokens=measured.num_tokens,
        num_shards=measured.num_shards,
        rows_per_shard=measured.rows_per_shard,
        num_parameters=size.num_parameters,
        num_layers=size.num_layers,
        weight_bytes=size.weight_bytes,
        dtype=size.dtype,
        quantized=size.quantized,
        flops=size.forward_flops(measured.num_sequences, settings.sequence_length),
        device=machine.device,
        device_free_bytes=machine.device_free,
        host_free_bytes=machine.host_free,
        rows=tuple(rows),
        auto=auto,
        auto_why=why,
        distillation=distillation,
    )


def _calibration(
    checkpoint: Checkpoint | None,
    size: Footprint,
    settings: Settings,
    costs: Mapping[str, Sequence[PartitionCost]],
    request: EstimateRequest,
) -> Calibration:
    """Return the throughput of this machine, measured, or that of hardware, computed."""
    if request.hardware is None:
        source, corpus = checkpoint or _fetch_tokenizer(str(request.model), settings), request.corpus or ""
        flat = [cost for alternatives in costs.values() for cost in alternatives]
        timed = {cost.partition: cost.timed_limits for cost in flat if cost.partition == WHOLE or cost.is_timed()}
        return calibrate(source, corpus, settings, size, timed)
    planned = None
    if request.corpus:
        source = checkpoint or _fetch_tokenizer(str(request.model), settings)
        tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
        planned, settings = split_into_shards(tokenize_corpus(request.corpus, tokenizer, settings), size, settings)
    return calibrate_on_paper(request.hardware, size, settings, planned)


def partition_costs(
    weights: Checkpoint | str, size: Footprint, settings: Settings, machine: Machine, request: EstimateRequest
) -> dict[str, list[PartitionCost]]:
    """Return memory and time of every partition, the simplest first; see `partition.cost.PartitionCost`.

    A partition of several ranks has an alternative for each number of nodes that divides the nodes.
    """

    def costs(name: str) -> list[PartitionCost]:
        numbers = [request.ranks]
        if PARTITIONS[name].gang and not request.ranks and machine.nodes > 1:
            numbers = [n * machine.gpus_per_node for n in range(1, machine.nodes + 1) if machine.nodes % n == 0]
        kind = replica_class(name).cost
        return [kind(name, weights, size, settings, ranks, request.max_memory, machine) for ranks in numbers]

    return {name: costs(name) for name in PARTITIONS}


def _fitting_row(alternatives: Sequence[PartitionCost], measured: Calibration) -> Row:
    """Return the row of the first alternative of a partition that fits, or of the last one."""
    for cost in alternatives:
        counters = counter_bytes(cost.size, cost.settings, measured.num_strata)
        found = row(cost, cost.usage(measured, counters), measured.num_shards)
        if found.fits:
            break
    return found


def _automatic(size: Footprint, settings: Settings, machine: Machine, request: EstimateRequest) -> tuple[str, str]:
    """Return the partition that a run of one replica chooses, and the reason; none and the reason if it is refused."""
    execution = Execution(max_memory=request.max_memory)
    try:
        placement = choose(size, settings, execution, machine.devices())
    except ConfigError as error:
        return "", f"{error.message} {error.hint}".replace("`", "").strip()
    count = placement.gpus if placement.gpus > 1 else 0
    return placement.partition, placement.why + (f"; over {count} GPUs" if count else "")


def row(cost: PartitionCost, usage: Usage, num_shards: int) -> Row:
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
    if cost.size.quantized != cost.stored.quantized:
        usage = replace(usage, why=f"{usage.why}; weights are unpacked to {cost.size.dtype}")
    return Row(
        partition=cost.partition,
        ranks=cost.ranks,
        gpus=cost.gpus,
        replicas=max(1, machine.gpus // max(1, cost.gpus)) if cost.on_gpu else 1,
        device_bytes=usage.device_bytes,
        host_bytes=usage.host_bytes,
        exchanged_bytes=usage.exchanged_bytes,
        fits=not lacks,
        seconds=usage.seconds,
        shard_seconds=usage.seconds / num_shards,
        why="; ".join([*lacks, usage.why]),
    )


def _fetch_tokenizer(model: str, settings: Settings) -> Checkpoint:
    return fetch_files(model, _TOKENIZER_FILES + (["*.py"] if settings.trust_remote_code else []))
