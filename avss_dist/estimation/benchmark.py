"""Benchmark of a few layers of a model on this machine: random weights, the model's own shapes, real batches.

The benchmark runs in a process of its own, which plans the corpus, opens replicas and counts statistics as a run does,
so its times are complete and its memory is that of a run. The cost of a layer is the difference between checkpoints of
one layer and of a few layers.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avss_dist.core.errors import ModelError, RunFailed
from avss_dist.core.registry import WHOLE
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan, Shard, tokenize_corpus
from avss_dist.estimation.on_paper import UNPACKED_TRAFFIC, text_sizes
from avss_dist.estimation.small_models import VOCABULARY, save_layers
from avss_dist.estimation.transfers import copy_rate, gather_rate, sum_seconds
from avss_dist.measure.shard import analyze_shard, counter_bytes
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer, text_config, without_head
from avss_dist.models.safetensors import weight_files
from avss_dist.models.size import Footprint, find_layers, footprint
from avss_dist.partition.base import Placement
from avss_dist.partition.cost import LINK_SHARE, Calibration, Cost
from avss_dist.partition.open import open_replica
from avss_dist.partition.streaming.weights import StreamedWeights
from avss_dist.runs.shard_size import split_into_shards
from avss_dist.system.cores import computing_threads
from avss_dist.system.devices import pick_device
from avss_dist.system.memory import mapped_around_a_byte, peak_memory, reset_peak_memory, resident_memory

FEW_LAYERS = 3
LOADS = 3  # of a quantized layer, of which the fastest counts
SECONDS = 2.5  # for the rounds of one partition; there are three at least
MOST_ROUNDS = 9
MAPPED_AT_ONCE = 64 << 10  # bytes that Linux brings of a mapped file around one that is read, if it cannot be tried


def calibrate(
    checkpoint: Checkpoint,
    corpus: str,
    settings: Settings,
    size: Footprint,
    partitions: Mapping[str, Mapping[str, int]],
) -> Calibration:
    """Plan the corpus and time partitions, in a fresh process.

    Args:
        checkpoint: its configuration and tokenizer are read, its weights are not.
        settings: pinned settings, without ``auto``.
        partitions: ``max_memory`` of each partition to time; one of them is ``registry.WHOLE``.

    Raises:
        AvssError: the corpus or the tokenizer cannot be read, or the model cannot be built or observed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="avss-estimate-") as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare_process) as process,
    ):
        try:
            return process.submit(_measure, checkpoint, corpus, settings, size, dict(partitions), folder).result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "The benchmark process ended without a result.",
                "It may have run out of memory. In a script, call this under: if __name__ == '__main__'.",
            ) from error


def _prepare_process() -> None:
    """Import the libraries of a run's process, and discard output."""
    import avss_dist.runs.api  # noqa: F401

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _measure(
    checkpoint: Checkpoint,
    corpus: str,
    settings: Settings,
    size: Footprint,
    partitions: Mapping[str, Mapping[str, int]],
    folder: str,
) -> Calibration:
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    gc.freeze()  # the libraries stay: what closes a replica need not look through them
    library = resident_memory()
    planned = tokenize_corpus(
        corpus, load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code), settings
    )
    planned, settings = split_into_shards(planned, size, settings)
    settings = replace(settings, dequantize=False)  # the layers below are not quantized
    plan_peak, planned_bytes = peak_memory(), resident_memory()
    reset_peak_memory()
    few = min(FEW_LAYERS, size.num_layers)
    dtype = getattr(torch, size.dtype)
    models = {n: save_layers(config, n, settings, dtype, Path(folder, f"layers-{n}")) for n in sorted({1, few})}
    sizes = {n: footprint(model, settings) for n, model in models.items()}
    shard = _timed_part(planned.shards[0], models[1], settings)
    costs, peak, device_peak = {}, 0, 0
    for partition, limits in partitions.items():
        placement = Placement(partition=partition, max_memory=limits)
        costs[partition], host, device = _time(placement, models, sizes, size, shard, settings)
        if partition == WHOLE:
            peak, device_peak = host, device
    counters = counter_bytes(sizes[few], settings, shard.num_strata)
    weights = sum(s.weight_bytes for s in sizes.values())
    on_gpu, copied = settings.device == "cuda", copy_rate()
    return Calibration(
        **text_sizes(size, settings, planned),
        share=planned.num_sequences / shard.num_sequences,
        costs=costs,
        library_bytes=library,
        planned_bytes=planned_bytes,
        plan_peak_bytes=plan_peak,
        working_bytes=max(0, peak - planned_bytes - (0 if on_gpu else counters + weights)),
        device_working_bytes=max(0, device_peak - counters - weights) if on_gpu else 0,
        copy_bytes_per_second=copied,
        link_bytes_per_second=copied * LINK_SHARE,
        network_bytes_per_second=0.0,
        unpacked_bytes_per_second=_unpacking_rate(checkpoint, size, settings, copied),
        touched_bytes=touched_bytes(planned, size.hidden_size * size.element_bytes, _mapped_at_once(checkpoint)),
        sublayer_share=_sublayer_share(models[few], shard, settings),
        sum_seconds=0.0 if on_gpu else sum_seconds(size.hidden_bytes(settings.batch_size, settings.sequence_length)),
        gather_bytes_per_second=0.0 if on_gpu else gather_rate(max(*size.layer_bytes, size.embedding_bytes)),
    )


def touched_bytes(planned: CorpusPlan, row: int, at_once: int = MAPPED_AT_ONCE) -> int:
    """Return the bytes of a mapped table, with ``row`` bytes a row, that the tokens of a corpus bring into memory.

    Args:
        at_once: bytes that are read together.
    """
    tokens = np.unique(np.concatenate([np.unique(shard.input_ids) for shard in planned.shards])).astype(np.int64)
    blocks = {*(tokens * row // at_once), *((tokens + 1) * row // at_once)}
    return len(blocks) * at_once


def _mapped_at_once(checkpoint: Checkpoint) -> int:
    files = [] if checkpoint.gguf else [file for file in weight_files(checkpoint.folder) if file.is_file()]
    return mapped_around_a_byte(max(files, key=lambda file: file.stat().st_size)) if files else MAPPED_AT_ONCE


def _timed_part(shard: Shard, smallest: Checkpoint, settings: Settings) -> Shard:
    """Return the first batches of a shard, as many as the time allows, in tokens that the small vocabulary has."""

    def first(rows: int) -> Shard:
        ids = (shard.input_ids[:rows] % VOCABULARY).astype(np.int32)
        pairing = shard.pairing and shard.pairing.part(slice(rows))
        return replace(shard, input_ids=ids, lengths=shard.lengths[:rows], pairing=pairing)

    replica = open_replica(smallest, settings, Placement())
    for _ in range(2):  # the first compiles, and looks for fast ways to multiply
        seconds = analyze_shard(replica, first(settings.batch_size), settings).seconds
    replica.close()
    batches = max(1, int(SECONDS / 3 / (1 + FEW_LAYERS) / max(seconds, 1e-6)))
    return first(min(shard.num_sequences, batches * settings.batch_size))


def _time(
    placement: Placement,
    models: Mapping[int, Checkpoint],
    sizes: Mapping[int, Footprint],
    whole: Footprint,
    shard: Shard,
    settings: Settings,
) -> tuple[Cost, int, int]:
    """Return the cost of a shard with a partition, and the peak memory of the process and of its device."""
    seconds: dict[int, list[float]] = {n: [] for n in models}
    replicas = {n: open_replica(model, settings, placement) for n, model in models.items()}
    device, end = 0, time.perf_counter() + SECONDS
    for round_ in count():
        for n, replica in replicas.items():
            result = analyze_shard(replica, shard, settings)
            device = result.peak_memory_bytes
            if round_:
                seconds[n].append(result.seconds)
        if round_ == MOST_ROUNDS or (round_ >= 3 and time.perf_counter() > end):
            break
    peak = peak_memory()
    for replica in replicas.values():
        replica.close()
    few = max(models)
    short, long = (min(seconds[n]) for n in (min(models), few))  # other load on the machine only adds to a time
    layer = (long - short) / (few - 1) if few > 1 and long > short else long / few
    constant = max(0.0, long - layer * few)
    # Layers differ: the first may be dense and the others not. Arithmetic tells by how much.
    likeness = (whole.forward_flops(1, 1) / whole.num_layers) / (sizes[few].forward_flops(1, 1) / few)
    return Cost(layer=layer * likeness, other=constant), peak, device


def _unpacking_rate(checkpoint: Checkpoint, size: Footprint, settings: Settings, copied: float) -> float:
    """Return the rate at which streaming unpacks a layer, in bytes of the compute dtype per second; 0 if it need not.

    Zeros take the place of stored numbers. Without weight files here, the rate follows from that of copies.
    """
    if not (size.unpacking_bytes or size.quantized):
        return 0.0
    device = pick_device(settings.device)
    try:
        weights = StreamedWeights(checkpoint, replace(settings, dequantize=not checkpoint.gguf))
        backbone = without_head(weights.model)
        layers = find_layers(backbone, weights.model.config.get_text_config(), settings)
        parts, _ = weights.split([*layers], backbone)
    except ModelError:
        return copied / UNPACKED_TRAFFIC
    part = parts[len(parts) // 2]  # the first may be dense and the others not
    seconds = []
    with computing_threads(settings.threads):
        for _ in range(LOADS):
            start = time.perf_counter()
            weights.convert_zeros(part, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    unpacked = sum(weight.current().nbytes for weight in part.weights if not weight.stored)
    return unpacked / min(seconds)


def _sublayer_share(model: Checkpoint, shard: Shard, settings: Settings) -> float:
    """Return the share of a shard's time in the attention and MLP of layers."""
    replica = open_replica(model, settings, Placement())
    inside = 0.0

    def now() -> float:
        if replica.device.type == "cuda":
            torch.cuda.synchronize(replica.device)
        return time.perf_counter()

    def enter(*_: Any) -> None:
        nonlocal inside
        inside -= now()

    def leave(*_: Any) -> None:
        nonlocal inside
        inside += now()

    handles = []
    for layer in replica.layers:
        for module in dict.fromkeys(layer.taps[s].module for s in ("attention", "mlp") if s in layer.taps):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, prepend=True)]
    seconds = analyze_shard(replica, shard, settings).seconds
    for handle in handles:
        handle.remove()
    replica.close()
    return min(1.0, max(0.0, inside / seconds))
