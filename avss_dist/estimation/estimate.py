"""What a run will take, before any weight is loaded: memory and time of each partition on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from avss_dist.errors import without_secrets
from avss_dist.estimation.benchmark import Calibration, Cost, calibrate
from avss_dist.measure.shard import counter_bytes
from avss_dist.models.checkpoints import Checkpoint, fetch_files, locate
from avss_dist.models.size import Footprint, footprint
from avss_dist.partition.choose import PROCESS_BYTES, bytes_beside_weights, least_host_bytes
from avss_dist.partition.device_map import SPARE_SHARE, Device, Spread, spread
from avss_dist.partition.zero3 import PREFETCHED
from avss_dist.requests import EstimateRequest
from avss_dist.results import TabularResult
from avss_dist.settings import Settings
from avss_dist.system.devices import available_memory, devices_here, pick_device
from avss_dist.text import describe_bytes

SIMPLEST_FIRST = ("single", "device_map", "streaming", "zero3", "tensor_parallel")
ABOUT_AS_FAST = 1.25  # times the seconds of the fastest
DEEPSPEED_BYTES = 150 << 20  # that a process has more once it has loaded DeepSpeed
LINK_SHARE = 0.25  # of the rate of a copy in memory, that ranks on one host exchange tensors at
_TOKENIZER_FILES = ["config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A partition.

    Attributes:
        partition: one of ``registry.PARTITIONS``.
        ranks: processes of one replica.
        device_bytes: the most memory of each device: of each GPU, or, on a CPU, of each process.
        host_bytes: the most memory of the host, all ranks together.
        fits: whether so much is free here.
        seconds: for measuring all shards; starting, opening the model and writing tables come on top.
        why: what the numbers are made of, or what is missing.
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
    """A run that was not made.

    Attributes:
        model, corpus: as they were named.
        num_sequences, num_tokens, num_shards: of the plan.
        num_parameters, num_layers, weight_bytes, dtype: of the model, see `models.size.Footprint`.
        flops: floating-point operations of all forward passes; the language-model head does not run.
        device: ``cpu`` or ``cuda``; device_free_bytes of the fullest GPU, host_free_bytes of the host.
        rows: one for each partition, the simplest first.
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

    @property
    def best(self) -> Row | None:
        """The simplest partition that fits and is about as fast as the fastest; None where none fits."""
        fitting = [row for row in self.rows if row.fits]
        fastest = min((row.seconds for row in fitting), default=0.0)
        return next((row for row in fitting if row.seconds <= ABOUT_AS_FAST * fastest), None)

    def table(self) -> pa.Table:
        """A row for each partition."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def summary(self) -> str:
        """Of what, and how much."""
        return f"{self.model}, {self.num_layers} layers, {self.num_tokens:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON-ready values."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


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
    made = measure(source, checkpoint or model, size, request)
    return Estimate(
        model=model,
        corpus=without_secrets(corpus),
        num_sequences=made.measured.num_sequences,
        num_tokens=made.measured.num_tokens,
        num_shards=made.measured.num_shards,
        num_parameters=size.num_parameters,
        num_layers=size.num_layers,
        weight_bytes=size.weight_bytes,
        dtype=size.dtype,
        flops=size.forward_flops(made.measured.num_sequences, settings.sequence_length),
        device=made.here.device,
        device_free_bytes=made.here.device_free,
        host_free_bytes=made.here.host_free,
        rows=tuple(made.row(partition) for partition in SIMPLEST_FIRST),
    )


def measure(
    source: Checkpoint,
    weights: Checkpoint | str,
    size: Footprint,
    request: EstimateRequest,
) -> Arithmetic:
    """Measure a few layers of a model here, and return the arithmetic that makes the row of every partition.

    Args:
        source: has the configuration and the tokenizer.
        weights: where the headers of the weights are: the same, or a hub id.

    Raises:
        AvssError: the corpus or the tokenizer cannot be read, or the model cannot be built or observed.
    """
    settings = request.settings
    settings = replace(settings, dtype=size.dtype, device=pick_device(settings.device).type)
    here = Machine.look(settings.device, request.max_memory)
    placed = _spread(weights, size, settings, request.max_memory, here)
    timed = ["single", *(["device_map"] if placed.layers_on_disk else []), "streaming"]
    measured = calibrate(source, request.corpus, settings, size, timed)
    return Arithmetic(size, settings, request.ranks, request.max_memory, here, measured, placed)


def _fetch_tokenizer(model: str, settings: Settings) -> Checkpoint:
    return fetch_files(model, _TOKENIZER_FILES + (["*.py"] if settings.trust_remote_code else []))


@dataclass(frozen=True)
class Machine:
    """What may be used.

    Attributes:
        device: ``cpu`` or ``cuda``; gpus: how many.
        device_free: bytes of the fullest GPU, or of the host; host_free: of the host. What is free, or what is allowed
            where that is less.
    """

    device: str
    gpus: int
    device_free: int
    host_free: int

    @classmethod
    def look(cls, device: str, max_memory: Mapping[str, int]) -> Machine:
        """This machine, within limits by the name of a device."""
        devices, free = devices_here(device), available_memory()
        host = min(free, max_memory.get("cpu", free))
        if device == "cpu":
            return cls(device, 0, host, host)
        gpus = {str(gpu): torch.cuda.mem_get_info(gpu)[0] for gpu in range(devices.count)}
        return cls(device, devices.count, min(min(free, max_memory.get(gpu, free)) for gpu, free in gpus.items()), host)


def _spread(
    checkpoint: Checkpoint | str, size: Footprint, settings: Settings, max_memory: Mapping[str, int], here: Machine
) -> Spread:
    """Where a device map would put the weights on this machine."""
    batch = size.activation_bytes(settings.batch_size, settings.sequence_length)
    free: dict[Device, int] = {**dict.fromkeys(range(here.gpus), here.device_free), "cpu": here.host_free}
    limits = {name: max(0, int(room * SPARE_SHARE) - batch) for name, room in free.items()}
    beside = {"cpu": bytes_beside_weights(size, settings, here.device)}
    limits |= {
        name if name == "cpu" else int(name): max(0, limit - beside.get(name, batch))
        for name, limit in max_memory.items()
    }
    return spread(checkpoint, settings, limits)


@dataclass(frozen=True)
class Arithmetic:
    """Rows from what was measured: nothing is read or run."""

    size: Footprint
    settings: Settings
    ranks: int | None
    max_memory: Mapping[str, int]
    here: Machine
    measured: Calibration
    spread: Spread

    def row(self, partition: str) -> Row:
        """What the run takes with a partition."""
        make = {
            "single": self._single,
            "device_map": self._device_map,
            "streaming": self._streaming,
            "zero3": self._zero3,
            "tensor_parallel": self._tensor_parallel,
        }
        return make[partition]()

    def _seconds(self, cost: Cost, layers: int | None = None) -> float:
        return self.measured.share * cost.seconds(self.size.num_layers if layers is None else layers)

    def _memory(self, weights: int, *, ranks: int = 1, host_weights: int = 0, more: int = 0) -> tuple[int, int]:
        """(of each device, of the host) for so many bytes of weights on each device.

        Args:
            host_weights: bytes of weights in the host memory of each process, beside.
            more: other bytes on each device.
        """
        m = self.measured
        counters = counter_bytes(self.size, self.settings, m.num_strata)
        start = m.planned_bytes if ranks == 1 else m.library_bytes + DEEPSPEED_BYTES
        process = start + m.working_bytes + host_weights
        if self.here.device == "cuda":
            return weights + more + counters + m.device_working_bytes, ranks * max(process, m.plan_peak_bytes)
        process = max(process + weights + more + counters, m.plan_peak_bytes if ranks == 1 else 0)
        return process, ranks * process

    def _row(self, partition: str, ranks: int, memory: tuple[int, int], seconds: float, why: str) -> Row:
        device, host = memory
        if "cpu" in self.max_memory:  # a run is refused by this rule, before anything can be measured
            host_needed = max(host, least_host_bytes(partition, self.size, self.settings, self.here.device))
        else:
            host_needed = host
        need = [(host_needed, self.here.host_free, "host memory")]
        if self.here.device == "cuda":
            need.append((device, self.here.device_free, "GPU memory"))
        short = [f"lacks {describe_bytes(n - free)} of {what}" for n, free, what in need if n > free]
        if short and host_needed > host:
            short.append(f"{describe_bytes(PROCESS_BYTES)} of a limit are set aside for interpreter and libraries")
        if self.here.device == "cuda" and ranks > self.here.gpus:
            short.append(f"{ranks} GPUs are needed, {self.here.gpus} are here")
        return Row(
            partition=partition,
            ranks=ranks,
            device_bytes=device,
            host_bytes=host,
            fits=not short,
            seconds=seconds,
            why="; ".join([*short, why]),
        )

    def _single(self) -> Row:
        why = f"{describe_bytes(self.size.weight_bytes)} of weights stay in memory"
        seconds = self._seconds(self.measured.costs["single"])
        return self._row("single", 1, self._memory(self._resident(self.size.weight_bytes)), seconds, why)

    def _resident(self, weights: int, *, table: bool = True) -> int:
        """Of so many bytes of weights, those that come into memory: of a mapped file only what is read.

        Args:
            table: the token embeddings are among them.
        """
        if self.here.device == "cuda" or not self.size.zero_copy or not table:
            return weights
        unread = max(0, self.size.embedding_bytes - self.measured.touched_bytes)
        return min(weights, sum(self.size.layer_bytes) + self.size.other_bytes) - unread

    def _device_map(self) -> Row:
        on_host, on_disk = self.spread.held.get("cpu", 0), self.spread.layers_on_disk
        costs = self.measured.costs
        seconds = self._seconds(costs["single"], self.size.num_layers - on_disk)
        if on_disk:
            seconds += self._seconds(replace(costs["device_map"], rest=0.0), on_disk)
        if on_host and self.here.gpus:  # copied to a GPU for every batch
            seconds += self.measured.num_batches * on_host / self.measured.copy_bytes_per_second
        one = max(self.size.layer_bytes)
        if self.here.device == "cuda":
            on_gpu = max((size for name, size in self.spread.held.items() if isinstance(name, int)), default=0)
            memory = self._memory(on_gpu, host_weights=on_host, more=one)
        else:
            resident = self._resident(on_host, table=self.spread.table == "cpu")
            memory = self._memory(resident, more=one * bool(on_disk))
        why = (
            f"{on_disk} of {self.size.num_layers} layers on disk, read for every batch" if on_disk else "all in memory"
        )
        return self._row("device_map", 1, memory, seconds, why)

    def _streaming(self) -> Row:
        waiting = self.size.hidden_bytes(self.measured.rows_per_shard, self.settings.sequence_length)
        cuda = self.here.device == "cuda"
        held = 2 if cuda or not self.size.zero_copy else 1  # a mapped layer lies in its file; the next comes by itself
        layers = sum(sorted(self.size.layer_bytes)[-held:])
        weights = self.size.other_bytes + layers
        memory = self._memory(weights, host_weights=layers + waiting) if cuda else self._memory(weights, more=waiting)
        why = (
            f"{'two layers' if held == 2 else 'a layer'} and {describe_bytes(waiting)} of waiting hidden states in "
            f"memory; the layers' weights are read {self.measured.num_shards}x"
        )
        return self._row("streaming", 1, memory, self._seconds(self.measured.costs["streaming"]), why)

    def _zero3(self) -> Row:
        ranks = self._ranks()
        gathered = sum(self.size.layer_bytes) + self.size.other_bytes
        part = -(-self.size.weight_bytes // ranks)
        ahead = PREFETCHED * self.size.element_bytes if self.here.device == "cuda" else 0
        largest = max(*self.size.layer_bytes, self.size.embedding_bytes)  # twice: as it comes, and put together
        device, host = self._memory(part, ranks=ranks, more=2 * largest + min(ahead, gathered))
        # Ranks share the shards; on CPUs they share the cores too, so that nothing is gained.
        cuda, m = self.here.device == "cuda", self.measured
        if not cuda:  # while the model is opened, pages of its files, which the system can have back, are there too
            device = max(device, m.library_bytes + DEEPSPEED_BYTES + part + self.size.weight_bytes)
        work = self._seconds(m.costs["single"]) / (ranks if cuda else 1)
        rate = m.copy_bytes_per_second * LINK_SHARE * ranks / max(1, ranks - 1) if cuda else m.gather_bytes_per_second
        exchange = -(-m.num_batches // ranks) * gathered / rate
        why = "every rank holds a part and gathers one layer at a time"
        why += "; the exchange is modelled, not measured" * cuda
        return self._row("zero3", ranks, (device, host), work + exchange, why)

    def _tensor_parallel(self) -> Row:
        """What ranks do not divide (norms, residuals, statistics), each of them does: on CPUs with fewer cores."""
        ranks, m, cuda = self._ranks(), self.measured, self.here.device == "cuda"
        single = self._seconds(m.costs["single"])
        work = single * (m.sublayer_share / ranks + 1 - m.sublayer_share) * (1 if cuda else ranks)
        sums = 2 * self.size.num_layers
        hidden = self.size.hidden_bytes(m.num_sequences, self.settings.sequence_length)
        modelled = sums * 2 * hidden * (ranks - 1) / (m.copy_bytes_per_second * LINK_SHARE)
        exchange = modelled if cuda else sums * m.num_batches * m.sum_seconds * (ranks - 1)
        whole = self.size.weight_bytes
        part = self.size.other_bytes + sum(self.size.layer_bytes) // ranks
        memory = (
            self._memory(part, ranks=ranks, host_weights=whole) if cuda else self._memory(whole + part, ranks=ranks)
        )
        why = "every rank loads the whole model first, and keeps a part of each layer"
        why += "; the exchange is modelled, not measured" * cuda
        return self._row("tensor_parallel", ranks, memory, work + exchange, why)

    def _ranks(self) -> int:
        return self.ranks or max(2, self.here.gpus)
