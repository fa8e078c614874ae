"""Throughput of hardware that is not at hand, from published peak numbers instead of a benchmark.

A layer takes the longer of two times: of its arithmetic, and of reading its weights from the GPU's memory for each
batch. Nothing of this is measured, and every peak is reached by an assumed share.
"""

from __future__ import annotations

from avss_dist.core.hardware import ASSUMED_EFFICIENCY, Hardware
from avss_dist.core.registry import LAYERWISE, SEVERAL_GPUS, WHOLE
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.estimation.speed import OVERHEAD
from avss_dist.models.size import Footprint
from avss_dist.partition.choose import PROCESS_BYTES, batch_bytes
from avss_dist.partition.cost import Calibration, Cost
from avss_dist.runs.shard_size import rows_per_shard

ASSUMED_ROWS = 32_768  # of a text that is not given
UNPACKED_TRAFFIC = 5.5  # bytes that unpacking moves for each byte of the result: 1 stored, 4 + 4 in float32, 2 of it


def text_sizes(size: Footprint, settings: Settings, corpus: CorpusPlan | None) -> dict[str, int]:
    """Return the size of a text as fields of `Calibration`.

    Args:
        size: size of the model, by which shards are cut.
        settings: settings of the run, with the rows of a shard if there is a corpus.
        corpus: the text in shards; if it is None, ``max_sequences`` rows or `ASSUMED_ROWS` are assumed.
    """
    if corpus is not None:
        return {
            "num_sequences": corpus.num_sequences,
            "num_tokens": corpus.num_tokens,
            "num_shards": len(corpus.shards),
            "num_batches": corpus.num_batches(settings.batch_size),
            "rows_per_shard": corpus.shards[0].num_sequences,
            "num_strata": max(shard.num_strata for shard in corpus.shards),
        }
    rows = settings.max_sequences or ASSUMED_ROWS
    in_shard = min(rows, settings.sequences_per_shard or rows_per_shard(size, settings, rows))
    whole, remaining = divmod(rows, in_shard)
    batches = whole * -(-in_shard // settings.batch_size) + -(-remaining // settings.batch_size)
    return {
        "num_sequences": rows,
        "num_tokens": rows * settings.sequence_length,
        "num_shards": whole + bool(remaining),
        "num_batches": batches,
        "rows_per_shard": in_shard,
        "num_strata": 1,
    }


def calibrate_on_paper(
    hardware: Hardware, size: Footprint, settings: Settings, corpus: CorpusPlan | None
) -> Calibration:
    """Return the throughput and memory of hardware with a model and a text.

    Args:
        size: size of the model as its weights are kept.
        settings: pinned settings, without ``auto``.
        corpus: see `text_sizes`.
    """
    gpu, sizes = hardware.gpu, text_sizes(size, settings, corpus)
    rows = sizes["rows_per_shard"]
    batches = -(-rows // settings.batch_size)
    flops = size.forward_flops(rows, settings.sequence_length) / size.num_layers
    layer_bytes = sum(size.layer_bytes) / size.num_layers
    arithmetic = flops / gpu.flops[2 if size.element_bytes == 2 else 4]
    layer = OVERHEAD * max(arithmetic, batches * layer_bytes / gpu.bandwidth) / ASSUMED_EFFICIENCY
    stored = layer_bytes * size.stored_share
    reading = stored / gpu.host_link / ASSUMED_EFFICIENCY
    return Calibration(
        **sizes,
        share=sizes["num_sequences"] / rows,
        costs={
            WHOLE: Cost(layer=layer, other=0.0),
            SEVERAL_GPUS: Cost(layer=layer + batches * reading, other=0.0),  # of layers on disk
            LAYERWISE: Cost(layer=max(layer, reading), other=0.0),  # the next layer comes meanwhile
        },
        library_bytes=PROCESS_BYTES,
        planned_bytes=PROCESS_BYTES,
        plan_peak_bytes=PROCESS_BYTES,
        working_bytes=0,
        device_working_bytes=batch_bytes(size, settings),
        copy_bytes_per_second=gpu.host_link * ASSUMED_EFFICIENCY,
        touched_bytes=0,
        sublayer_share=1 / OVERHEAD,
        sum_seconds=0.0,
        gather_bytes_per_second=0.0,
        link_bytes_per_second=gpu.link * ASSUMED_EFFICIENCY,
        network_bytes_per_second=gpu.network * ASSUMED_EFFICIENCY if hardware.nodes > 1 else 0.0,
        unpacked_bytes_per_second=gpu.bandwidth * ASSUMED_EFFICIENCY / UNPACKED_TRAFFIC,
    )
