"""Synthetic warehouses: runs whose activations, or whose scores, the tests choose."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.core.intervention import removal_numbers, stored_removals
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, merge_stats
from avss_dist.stats.rankings import rank_lowest
from avss_dist.stats.scores import Threshold, score_run
from avss_dist.warehouse.encoding import encode_shard, to_file
from avss_dist.warehouse.schema import EVALUATION_TABLES, SCHEMA_VERSION, TABLES, Column, RunIdentity
from avss_dist.warehouse.storage import FILE_NAMES
from avss_dist.warehouse.store import Store
from support.oracle import By, Float64, oracle_stats

GRID = np.array([1e-5, 1e-2, 1e-1])
PUBLISHED = Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
Stats = dict[LayerKey, LayerStats]


def unpack_released(folder: Path) -> Path:
    """Unpack the warehouse that version 0.1.0 wrote into a folder, and return the folder. See ``test_released``."""
    shutil.unpack_archive(Path(__file__).parents[1] / "warehouse" / "schema_3" / "warehouse.tar.xz", folder)
    return folder


def rewrite_file(path: Path, table: pa.Table, version: int | str = SCHEMA_VERSION) -> None:
    """Replace a file by a table, with a valid checksum and a schema version."""
    metadata = {**(table.schema.metadata or {}), b"avss_schema_version": str(version).encode()}
    path.write_bytes(to_file(table.replace_schema_metadata(metadata)))


def rewrite_as_schema_3(folder: Path) -> None:
    """Write the files of a run in a table again as schema 3 had them, without names of parts and ids of experiments."""
    for path in folder.glob("*.parquet"):
        rows = pq.ParquetFile(path).read()
        numbers = [removal_numbers(stored_removals(row)) for row in rows.to_pylist()]
        place = rows.column_names.index("drop")
        old = rows.set_column(place, "drop", pa.array(numbers, pa.list_(pa.int32())))
        later = {"drop_parts", "experiment_id"} & set(rows.column_names)
        rewrite_file(path, old.drop_columns(sorted(later)), 3)


def write_shard(store: Store, run: RunIdentity, result: ShardResult) -> None:
    """Write a shard's result as a driver does."""
    store.write_shard_files(run.run_id, result.shard_id, encode_shard(run, result))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_row(run_id: str, **columns: Any) -> dict[str, Any]:
    """A row of ``runs``: done, a Llama, on the same text as every other."""
    names = ("skip_first_tokens", "layout", "row_start")
    settings = {"row_start": "auto"} | {name: columns.pop(name) for name in names if name in columns}
    number = sum(run_id.encode())
    return {
        "run_id": run_id,
        "status": "done",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
        "model": f"org/{run_id}",
        "revision": "main",
        "family": "llama",
        "dtype": "float32",
        "corpus": "text.txt",
        "corpus_fingerprint": columns.get("corpus", "text.txt"),
        "sequence_length": 8,
        "num_sequences": 16,
        "num_tokens": 128,
        "num_shards": 8,
        "device": "cpu",
        "wall_seconds": 2.0,
        "tokens_per_second": 64.0,
        "peak_memory_bytes": 10**9,
        "settings": json.dumps(settings),
        **columns,
    }


def identity_of(row: Mapping[str, Any]) -> RunIdentity:
    return RunIdentity(**{name: row[name] for name in ("run_id", "model", "revision", "family")})


def write_scores(root: Path, run_id: str, scores: Sequence[float], **columns: Any) -> None:
    """A run of given AVSS by layer: block site, pooled recipe, 1e-5."""
    write_profiles(root, run_id, {("block", "pooled", PUBLISHED_THRESHOLD): scores}, **columns)


def write_profiles(
    root: Path, run_id: str, profiles: Mapping[tuple[str, str, float], Sequence[float]], **columns: Any
) -> None:
    """A run of given AVSS by layer, for several sites, recipes and absolute thresholds."""
    rivals = columns.pop("rivals", {})
    row = run_row(run_id, **columns)
    rows = []
    for (site, recipe, threshold), scores in profiles.items():
        ranks = rank_lowest(np.asarray(scores, float))
        for i, score in enumerate(scores):
            place = {"layer": i, "layer_name": f"layers.{i}", "depth": (i + 0.5) / len(scores), "site": site}
            at = {"recipe": recipe, "threshold": threshold, "threshold_kind": "absolute", "quality": "ok"}
            rival_values = {name: values[i] for name, values in rivals.items()}
            rank = None if np.isnan(ranks[i]) else int(ranks[i])
            rows.append({**place, **at, "avss_smoothed": score, "rank": rank, "near_zero_count": 500.0, **rival_values})
    store = Store(root)
    store.write_rows("scores", identity_of(row), rows)
    store.write_run({"num_layers": len(scores), **row})


def write_every_table(root: Path, runs: Sequence[str] = ("a", "b"), evaluations: Sequence[str] = ("e", "f")) -> None:
    """Write two equal rows of every table for each run, or for each evaluation. A run has one row of ``runs``."""
    store = Store(root)
    for name, table in TABLES.items():
        if name == "runs":
            continue
        row = {column.name: _allowed_value(column) for column in table.columns if column.name != "run_id"}
        for run_id in evaluations if name in EVALUATION_TABLES else runs:
            store.write_rows(name, identity_of(run_row(run_id)), [row, row], file_name(name))
    for run_id in runs:
        store.write_run(run_row(run_id, num_layers=1, num_shards=1, num_sequences=2, thresholds=[PUBLISHED_THRESHOLD]))


def file_name(table: str) -> str:
    """Return a valid name of a file of a table."""
    for name in (table, "run", "shard-00000", "0" * 20):
        if re.fullmatch(FILE_NAMES[table], name):
            return name
    raise AssertionError(f"no file of {table} has a name that is known here")


def _allowed_value(column: Column) -> Any:
    """Return a value that a column may hold. Lists have one element."""
    if column.choices:
        return column.choices[0]
    if column.pattern:
        return ["attention.1"]
    if column.name == "settings":
        return "{}"
    is_list = pa.types.is_list(column.type)
    kind = column.type.value_type if is_list else column.type
    if pa.types.is_map(kind):
        value: Any = {"package": "1.0"}
    elif pa.types.is_timestamp(kind):
        value = datetime(2026, 1, 1, tzinfo=UTC)
    else:
        value = pa.scalar(1).cast(kind).as_py()
    return [value] if is_list else value


def write_measured(
    root: Path, run_id: str, shards: Sequence[Stats], layers: int, shard_tokens: int = 0, **columns: Any
) -> None:
    """A run as the driver leaves it: partials, merged statistics, scores, and its row.

    Args:
        shard_tokens: number of tokens of each shard.
    """
    row = run_row(run_id, num_layers=layers, num_shards=len(shards), **columns)
    names = tuple(f"layers.{i}" for i in range(layers))
    store = Store(root)
    identity = identity_of(row)
    merged = merge_stats(shards)
    for i, shard in enumerate(shards):
        strata = {(*key, ""): stats for key, stats in shard.items()}
        result = ShardResult(shard_id=i, content_hash=f"hash{i}", layers=names, strata=strata, num_tokens=shard_tokens)
        write_shard(store, identity, result)
    store.write_layer_stats(identity, names, merged)
    store.write_rows("scores", identity, score_run(merged, names, shards))
    store.write_run(row)


SCALES = np.array([1.0, 2.2, 0.6, 3.3, 1.5, 0.4, 5.0, 2.8])  # of layers, in no order


def activations(seed: int = 0, shards: int = 8, scales: Float64 = SCALES) -> Float64:
    """Healthy ones, x[shards, layers, sequences, tokens, units]: every unit has a mean and a noise of its layer's
    scale, and a tenth of the elements, the same ones in each layer, are as small as 1e-7.
    """
    rng = np.random.default_rng(seed)
    shape = (shards, 1, 4, 8, 24)
    alike = rng.normal(size=24) + 0.3 * rng.normal(size=shape)
    x = scales[:, None, None, None] * alike
    small = rng.random(shape) < 0.1
    return np.where(small, 1e-7 * rng.choice([-1, 1], shape), x).astype(np.float32).astype(np.float64)


def stats_of(
    x: Float64, site: str = "block", before: Float64 | None = None, *, by: By = "cut", units: bool = True
) -> list[Stats]:
    """Statistics by shard of x[shards, layers, sequences, tokens, units], and with ``before`` of the updates too.

    Counted ``by``: see `oracle_stats`.
    """
    mask = np.ones(x.shape[2:4], bool)
    stats_of_shards: list[Stats] = []
    for s, shard in enumerate(x):
        stats: Stats = {}
        for i, values in enumerate(shard):
            if before is None:
                stats[i, site] = oracle_stats(values, mask, GRID, units=units, by=by)
            else:
                update = values - before[s, i]
                stats[i, site] = oracle_stats(values, mask, GRID, units=True, before=before[s, i])
                stats[i, "update"] = oracle_stats(update, mask, GRID, units=True)
        stats_of_shards.append(stats)
    return stats_of_shards
