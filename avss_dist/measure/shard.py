"""Measurement of one shard with one replica: a pure function from tokens to a ShardResult."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import numpy as np
import torch

from avss_dist.core.devices import peak_device_memory, reset_peak_device_memory
from avss_dist.core.errors import BatchTooLarge, ModelError
from avss_dist.core.memory import halve_until_it_fits, peak_memory
from avss_dist.core.settings import Settings
from avss_dist.core.sites import INPUT_SITES
from avss_dist.core.text import describe_layers
from avss_dist.core.values import NewRow
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.measure.kernels.reference import PATTERNS
from avss_dist.measure.observer import UNIT_SITES, Hooks, Observer, attached
from avss_dist.measure.rows import PlacedRows, in_order
from avss_dist.models.checkpoint.size import Footprint
from avss_dist.models.structure.find import absent_sites
from avss_dist.models.structure.layers import Layer
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.replica import Replica, dummy_batch, no_observation
from avss_dist.stats.layer_stats import ROW_FIELDS, LayerKey, ShardResult, merge_stats

Heartbeat = Callable[[], None]
SEE_PADDING = ("convbert", "fnet", "nystromformer", "paligemma", "yoso")
"""Families whose code in transformers lets padding change the tokens beside it."""


def analyze_shard(
    replica: Replica,
    shard: Shard,
    settings: Settings,
    *,
    rows: int | None = None,
    forwards: int = 0,
    heartbeat: Heartbeat | None = None,
    hooks: Hooks | None = None,
    computed: Callable[[], None] | None = None,
) -> ShardResult:
    """Measure a shard. Calls are independent, and the model is left unchanged.

    A shard without a token that counts has no statistics.

    If a batch does not fit in memory, the shard is measured again with half as many rows per batch. Rows are
    independent, so that only the last digits of the moments can change. The result's notes mention it.

    Args:
        rows: rows per batch, by default those of the settings.
        forwards: minimum number of forward passes, which other ranks depend on. Uncounted dummy batches fill up to it.
        heartbeat: called at the start of every layer.
        hooks: attached hooks of the replica's layers, for shards that are measured concurrently in threads.
        computed: called when the replica can begin another shard, before this one is concluded.

    Raises:
        ModelError: if a layer cannot be observed, or no layer has any of the sites.
        BatchTooLarge: if one row does not fit, or several do not and other ranks must halve their batches, too.
    """
    start = time.perf_counter()
    torch.set_num_threads(settings.threads)
    if replica.device.type == "cuda":
        reset_peak_device_memory()
    rows = rows or settings.batch_size
    partition = replica.model["partition"]
    # Several ranks would have to halve their batches together, so that they do not.
    least = rows if PARTITIONS[partition].gang else 1

    def too_large(rows: int) -> BatchTooLarge:
        return BatchTooLarge(
            f"{rows} x {settings.sequence_length} tokens do not fit in memory with the partition '{partition}'.",
            "Use a smaller `sequence_length`, or a `partition` that holds less: device_map, fsdp, streaming.",
        )

    with ExitStack() as stack:
        if hooks is None:
            hooks = stack.enter_context(attached(replica.layers, settings.sites, experts=settings.experts))
        measuring = partial(_measure, replica, shard, hooks, forwards, settings, heartbeat)
        observer, rows = halve_until_it_fits(measuring, rows, too_large, least=least)
    observer.send()
    rows_of_answers = observer.send_rows()
    expert_stats = observer.experts.send()
    device = "cpu"
    peak = peak_memory()
    if replica.device.type == "cuda":
        device = torch.cuda.get_device_name(replica.device)
        peak = peak_device_memory()
    if computed:
        computed()
    parts = replica.collect((observer.strata(), rows_of_answers()))
    strata = merge_stats(counted for counted, _ in parts)
    if not strata and shard.num_tokens and replica.reports_stats:
        notes = "; ".join(replica.model["notes"])
        raise ModelError(f"The model has none of the sites {', '.join(settings.sites)}.", notes or None)
    layers = tuple(layer.name for layer in replica.layers)
    answers = None
    if shard.pairing:
        answers = _answer_rows(shard, [answer_rows for _, answer_rows in parts])
    experts = None
    if settings.experts:
        experts = expert_stats()
    model = _describe(replica, shard, rows, settings)
    return ShardResult(
        shard_id=shard.shard_id,
        content_hash=shard.content_hash,
        layers=layers,
        strata=strata,
        num_tokens=shard.num_tokens,
        seconds=time.perf_counter() - start,
        device=device,
        model=model,
        peak_memory_bytes=peak,
        rows=answers,
        experts=experts,
    )


def follow(replica: Replica, forwards: int) -> None:
    """Run dummy batches on a rank that has no shard while others have."""
    replica.forward([dummy_batch()] * forwards, no_observation)


def _measure(
    replica: Replica,
    shard: Shard,
    hooks: Hooks,
    forwards: int,
    settings: Settings,
    heartbeat: Heartbeat | None,
    rows: int,
) -> Observer:
    """Return an observer that has counted a shard, in batches of so many rows."""
    batches = list(shard.batches(rows))
    while len(batches) < forwards:
        batches.append(dummy_batch())
    counted = [batch for batch in batches if batch.observed.any()]
    observer = Observer(hooks, settings.thresholds, split=replica.split, passes=len(counted), heartbeat=heartbeat)

    def observing(batch: Batch) -> AbstractContextManager[None]:
        return observer.batch(batch.observed, batch.pairing)

    replica.forward(batches, observing)
    return observer


def _answer_rows(shard: Shard, parts: Sequence[Mapping[LayerKey, PlacedRows]]) -> dict[str, np.ndarray]:
    """Return the columns of ``row_stats`` of the shard, for each layer, site and row, from the parts of all ranks."""
    pairing = shard.pairing
    assert pairing is not None
    answer_tokens = shard.lengths.astype(np.int64) - shard.starts
    answers = {
        "row": pairing.rows,
        "pair": pairing.pairs,
        "stratum": np.array(pairing.strata),
        "prompt_tokens": pairing.starts.astype(np.int64),
        "answer_tokens": np.maximum(answer_tokens, 0),
    }
    every_key: set[LayerKey] = set()
    for rows in parts:
        every_key.update(rows)
    keys = sorted(every_key)
    stats = []
    for key in keys:
        stats.append(in_order([rows[key] for rows in parts if key in rows]))
    columns = {
        "layer": np.repeat([layer for layer, _ in keys], len(pairing.rows)),
        "site": np.repeat([site for _, site in keys], len(pairing.rows)),
    }
    for name, values in answers.items():
        columns[name] = np.tile(values, len(keys))
    for name in ROW_FIELDS:
        measured = [values[name] for values in stats]
        columns[name] = np.concatenate(measured or [np.zeros(0)])
    return columns


def counter_bytes(size: Footprint, settings: Settings, strata: int = 1) -> int:
    """Return the bytes of the accumulators of all layers, sites and strata. See `kernels.reference.Accumulator`."""
    # Each pattern of 16 bits has a count of 4 bytes. In float32 half as many have counts of 8 bytes.
    counts = PATTERNS * 4
    unit_sites = set(UNIT_SITES) & set(settings.sites)
    # Two sums in float64 for each unit.
    units = 16 * size.hidden_size * len(unit_sites)
    return strata * size.num_layers * (len(settings.sites) * counts + units)


def _describe(replica: Replica, shard: Shard, rows: int, settings: Settings) -> NewRow:
    """Return the description of the replica's model, with columns and notes that depend on the measurement."""
    model = dict(replica.model)
    notes = list(model["notes"])
    if model["family"] in SEE_PADDING and np.ptp(shard.lengths):
        notes.append(
            f"in a {model['family']} model padding changes the tokens of a row; rows of `layout` packed have none"
        )
    inputs = [site for site in INPUT_SITES if site in settings.sites]
    if inputs:
        notes += absent_sites(replica.layers, inputs)
        model["projections"] = _projections_as_json(replica.layers)
    without = [layer.index for layer in replica.layers if layer.experts is None]
    if settings.experts and without:
        note = f"layers {describe_layers(without)} have no routed experts"
        if len(without) == len(replica.layers):
            note = "no layer has routed experts in one module, which is called with the experts and gates of each token"
        notes.append(note)
    if rows < settings.batch_size:
        notes.append(f"{settings.batch_size} rows did not fit in memory at once; some batches had {rows}")
    model["notes"] = notes
    return model


def _projections_as_json(layers: Sequence[Layer]) -> str:
    """Return the linear maps of all layers as JSON: rows of layer, path, site, outputs and inputs."""
    rows = []
    for layer in layers:
        for projection in layer.projections:
            rows.append([layer.index, projection.path, projection.site, projection.outputs, projection.inputs])
    return json.dumps(rows, separators=(",", ":"))
