"""The warehouse: lossless, atomic, whole runs only, readable by anything that reads Parquet; cells are read once."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import warehouses
from support.rows import column, where
from support.warehouses import rewrite_file, write_shard

from avss_dist.core.errors import StorageFull, WarehouseError
from avss_dist.core.sites import SITES
from avss_dist.stats.layer_stats import HISTOGRAM_BINS, LayerKey, LayerStats, ShardResult, merge_stats
from avss_dist.warehouse.checks import checkpoint_name
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMA_VERSION, SCHEMAS, TABLES, RunIdentity
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store

RUN = RunIdentity(run_id="tiny-0123456789", model="org/tiny", revision=None, family="llama")
LAYERS = ("model.layers.0", "model.layers.1", "model.layers.2")
THRESHOLDS = np.array([1e-5, 1e-2])


def make_stats(seed: int = 0, units: int = 6) -> LayerStats:
    rng = np.random.default_rng(seed)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    bins = rng.choice(HISTOGRAM_BINS, 200, replace=False)
    histogram[bins] = rng.integers(1, 2**40, 200)
    scalars: dict[str, Any] = {"mean": rng.normal(), "m2": rng.random(), "min": -3.0, "max": 4.0, "max_abs": 4.0}
    return LayerStats(
        thresholds=THRESHOLDS,
        near_zero=rng.integers(0, 99, 2),
        count=int(histogram.sum()),
        histogram=histogram,
        unit_count=7,
        unit_sum=rng.normal(size=units),
        unit_sum_sq=rng.random(units),
        **scalars,
    )


def make_shard(shard_id: int, layers: tuple[str, ...] = LAYERS, units: int = 6) -> ShardResult:
    strata = {}
    for layer in range(len(layers)):
        for site in SITES:
            strata[layer, site, ""] = make_stats(shard_id * 100 + layer, units)
    return ShardResult(
        shard_id=shard_id,
        content_hash=f"hash{shard_id}",
        layers=layers,
        strata=strata,
        num_tokens=64,
        seconds=0.1 + shard_id,
    )


def run_row(status: str = "done", run_id: str = RUN.run_id, **more: Any) -> dict[str, Any]:
    about = {"status": status, "model": RUN.model, "created_at": datetime(2025, 1, 2, tzinfo=UTC), "notes": []}
    measured = {"thresholds": (1e-5, 1e-2), "sites": SITES, "versions": {"torch": "2.0", "numpy": "2.1"}}
    return warehouses.run_row(run_id, **about, **measured, **more)


def score_rows() -> list[dict[str, Any]]:
    """Return rows with numbers of NumPy, with NaN and with None."""
    reading = {"site": "block", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}
    rows: list[dict[str, Any]] = []
    for i in range(3):
        place = {"layer": i, "layer_name": f"layers.{i}", "depth": (i + 0.5) / 3}
        scores = {"avss": float("nan"), "avss_smoothed": i + 0.5, "nav": None, "rank": np.int64(i + 1)}
        counts = {"quality": "ok", "count": 2**40, "variance": np.float64(i)}
        rows.append({**place, **reading, **scores, **counts})
    return rows


def whole_run(store: Store, run_id: str = RUN.run_id, **more: Any) -> None:
    run = replace(RUN, run_id=run_id)
    shard = make_shard(0)
    store.storage.create()
    write_shard(store, run, shard)
    store.write_layer_stats(run, LAYERS, shard.stats)
    store.write_rows("scores", run, score_rows())
    store.write_run(run_row(run_id=run_id, **more))


def assert_same(a: ShardResult, b: ShardResult) -> None:
    for f in fields(ShardResult):
        if f.name != "strata":
            assert getattr(a, f.name) == getattr(b, f.name)
    assert_same_stats(dict(a.stats), dict(b.stats))


def assert_same_stats(a: dict[LayerKey, LayerStats], b: dict[LayerKey, LayerStats]) -> None:
    assert a.keys() == b.keys()
    for key, stats in a.items():
        for f in fields(LayerStats):
            x = np.asarray(getattr(stats, f.name))
            y = np.asarray(getattr(b[key], f.name))
            assert x.dtype == y.dtype, f.name
            assert x.shape == y.shape, f.name
            assert x.tobytes() == y.tobytes(), f.name


def shard_path(root: Path, shard_id: int) -> Path:
    return root / f"shard_stats/run_id={RUN.run_id}/shard-{shard_id:05d}.parquet"


def temporaries(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.is_file()]


FLOATS = st.floats(allow_nan=True, allow_infinity=True).map(lambda x: float("nan") if np.isnan(x) else x)
COUNTS = st.integers(0, 2**40)
BIN_COUNTS = st.dictionaries(st.sampled_from([0, 1, 1000, 2047]), COUNTS)


@st.composite
def layer_stats(draw: st.DrawFn) -> LayerStats:
    if draw(st.booleans()):
        return LayerStats.zero(THRESHOLDS)
    values: dict[str, Any] = {}
    for f in fields(LayerStats):
        if f.type in ("int", "float"):
            values[f.name] = draw(COUNTS if f.type == "int" else FLOATS)
    sizes = draw(st.sets(st.floats(0, width=32, allow_infinity=False), max_size=4))
    values["abs_value"] = np.array(sorted(sizes), np.float32)
    values["abs_value_count"] = np.array([draw(COUNTS) for _ in sizes], np.int64)
    values["abs_value_cut"] = draw(st.booleans())
    units = draw(st.sampled_from([0, 3]))
    for name in ("unit_sum", "unit_sum_sq"):
        values[name] = np.array(draw(st.lists(FLOATS, min_size=units, max_size=units)), np.float64)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    for index, count in draw(BIN_COUNTS).items():
        histogram[index] = count
    values["near_zero"] = np.array(draw(st.lists(COUNTS, min_size=2, max_size=2)), np.int64)
    return LayerStats(thresholds=THRESHOLDS, histogram=histogram, **values)


KEYS = st.tuples(st.integers(0, 2), st.sampled_from(SITES))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stats=st.dictionaries(KEYS, layer_stats(), max_size=3), seconds=st.floats(0, 1e9), tokens=COUNTS)
def test_round_trip_is_lossless_and_merges_again(
    tmp_path: Path, stats: dict[LayerKey, LayerStats], seconds: float, tokens: int
) -> None:
    store = Store(tmp_path)
    strata = {(*key, ""): values for key, values in stats.items()}
    result = ShardResult(shard_id=0, content_hash="h", layers=LAYERS, strata=strata, num_tokens=tokens, seconds=seconds)
    shards = [result, replace(result, shard_id=1)]
    for shard in shards:
        write_shard(store, RUN, shard)
    store.write_layer_stats(RUN, LAYERS, stats)
    back = [*store.reader.each_shard(RUN.run_id, {0: "h", 1: "h"})]
    for shard, read in zip(shards, back, strict=True):
        assert_same(shard, read)
        assert_same(shard, pickle.loads(pickle.dumps(read)))
    assert_same_stats(stats, store.reader.read_layer_stats(RUN.run_id))
    with np.errstate(all="ignore"):
        assert_same_stats(merge_stats([s.stats for s in shards]), merge_stats([s.stats for s in back]))


def test_files_that_were_encoded_by_a_worker_are_kept_as_the_same_bytes(tmp_path: Path) -> None:
    """They travel without a copy."""
    plain = make_shard(3)
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(encode_shard(RUN, plain), 5, buffer_callback=buffers.append)
    files = pickle.loads(sent, buffers=buffers)
    assert len(sent) < 1000
    assert len(buffers) == 1

    here = Store(tmp_path / "here")
    there = Store(tmp_path / "there")
    write_shard(here, RUN, plain)
    there.write_shard_files(RUN.run_id, 3, files)
    assert shard_path(tmp_path / "here", 3).read_bytes() == shard_path(tmp_path / "there", 3).read_bytes()
    (back,) = there.reader.each_shard(RUN.run_id, {3: plain.content_hash})
    assert_same(back, plain)


def test_schemas_are_the_contract() -> None:
    assert list(SCHEMAS) == list(TABLES)
    stats = {f.name for f in fields(LayerStats)} - {"histogram"} | {"histogram_bin", "histogram_count"}
    identity = ["run_id", "model", "revision", "family"]
    place = ["layer", "layer_name", "depth", "site"]
    assert SCHEMAS["layer_stats"].names[:9] == [*identity, *place, "thresholds"]
    assert set(SCHEMAS["layer_stats"].names[8:]) == stats
    assert SCHEMAS["shard_stats"].names[:10] == [*identity, "shard_id", "content_hash", *place]
    assert " ".join(SCHEMAS["scores"].names) == (
        "run_id model revision family layer layer_name depth site recipe threshold threshold_kind count "
        "near_zero_count variance sparsity nav nas avss avss_smoothed avss_normalized avss_cumulative rank "
        "avss_low avss_high lowest_set_probability quality block_influence angular_distance relative_magnitude "
        "update_variance_ratio"
    )
    assert SCHEMAS["runs"].field("versions").type == pa.map_(pa.string(), pa.string())
    assert SCHEMAS["runs"].field("created_at").type == pa.timestamp("us", "UTC")
    assert SCHEMAS["scores"].field("rank").type == pa.int32()
    for schema in SCHEMAS.values():
        assert schema.field("run_id").type == pa.string()


OF_RUNS = ["runs", "scores", "layer_stats", "shard_stats"]


@pytest.mark.parametrize("name", OF_RUNS)
def test_tables_have_their_schema(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    whole_run(store)
    table = store.reader.table(name)
    assert table.schema.equals(SCHEMAS[name])
    assert set(table["run_id"].to_pylist()) == {RUN.run_id}
    chosen = ["model", "run_id"]
    empty = store.reader.table(name, run_ids=["other"], columns=chosen)
    assert empty.schema.names == chosen


@pytest.mark.parametrize("name", OF_RUNS)
def test_files_are_compressed_and_have_the_version_of_their_schema(tmp_path: Path, name: str) -> None:
    whole_run(Store(tmp_path))
    (file,) = (tmp_path / name).rglob("*.parquet")
    metadata = pq.read_metadata(file)
    assert metadata.num_row_groups == 1
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert metadata.metadata[b"avss_schema_version"] == str(SCHEMA_VERSION).encode()
    assert "run_id" not in pq.ParquetFile(file).schema_arrow.names


def test_a_table_that_was_not_written_is_empty(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store)
    assert store.reader.table("evaluations").num_rows == 0


def test_nan_and_none_are_null(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store)
    row = store.reader.table("scores").to_pylist()[2]
    assert row["avss"] is None
    assert row["nav"] is None
    assert row["avss_low"] is None
    assert row["avss_smoothed"] == 2.5
    assert row["rank"] == 3
    assert row["count"] == 2**40
    assert row["model"] == "org/tiny"


def test_a_row_with_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WarehouseError, match=r"Unknown column 'avs'.\nDid you mean 'avss'"):
        Store(tmp_path).write_rows("scores", RUN, [{"avs": 1.0}])


def test_run_row_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.reader.run(RUN.run_id) is None
    store.write_run(run_row(num_tokens=5))
    row = store.reader.run(RUN.run_id)
    assert row is not None
    assert row["versions"] == {"torch": "2.0", "numpy": "2.1"}
    assert row["thresholds"] == [1e-5, 1e-2]
    assert row["schema_version"] == SCHEMA_VERSION
    assert row["created_at"] == datetime(2025, 1, 2, tzinfo=UTC)
    assert row["error"] is None
    assert set(row) == set(SCHEMAS["runs"].names)


def test_a_run_has_a_known_status(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="status"):
        Store(tmp_path).write_run(run_row("finished"))


def test_a_failure_is_replaced_by_success_and_not_the_other_way_round(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for status, expected in [("failed", "failed"), ("done", "done"), ("failed", "done")]:
        store.write_run(run_row(status, "new"))
        (stored,) = store.reader.runs()["status"].to_pylist()
        assert stored == expected


@pytest.mark.parametrize("run_id", ["../x", "a/b", "", "a b", "a%2Fb", "é"])
def test_run_ids_are_slugs(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ValueError, match="a run id is made of"):
        Store(tmp_path).write_rows("scores", replace(RUN, run_id=run_id), [])
    assert list(tmp_path.iterdir()) == []


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_foreign(path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), path)


def damage_swap(path: Path) -> None:
    path.write_bytes(path.with_name("shard-00000.parquet").read_bytes())


@pytest.mark.parametrize("damage", [damage_truncate, damage_foreign, damage_swap, Path.unlink])
def test_a_damaged_partial_is_left_out(tmp_path: Path, damage: Any) -> None:
    store = Store(tmp_path)
    for i in range(3):
        write_shard(store, RUN, make_shard(i))
    damage(shard_path(tmp_path, 1))
    hashes = {0: "hash0", 1: "hash1", 2: "hash2"}
    first, last = store.reader.each_shard(RUN.run_id, hashes)
    assert first.shard_id == 0
    assert last.shard_id == 2
    assert_same(last, make_shard(2))


def test_a_partial_of_another_plan_or_run_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_shard(store, RUN, make_shard(0))
    assert list(store.reader.each_shard(RUN.run_id, {0: "of another plan"})) == []
    shutil.copytree(shard_path(tmp_path, 0).parent, tmp_path / "shard_stats/run_id=another")
    assert list(store.reader.each_shard("another", {0: "hash0"})) == []


def test_any_flipped_bit_of_a_partial_is_seen(tmp_path: Path) -> None:
    """In the footer too: without a checksum of the whole file, a column that is lost there takes its default."""
    store = Store(tmp_path)
    write_shard(store, RUN, make_shard(0))
    path = shard_path(tmp_path, 0)
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    rng = np.random.default_rng(0)
    anywhere = rng.integers(len(data), size=100)
    in_footer = rng.integers(len(data) - footer, len(data), size=300)
    for byte in [*anywhere, *in_footer]:
        flipped = bytearray(data)
        flipped[byte] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        assert list(store.reader.each_shard(RUN.run_id, {0: "hash0"})) == [], byte
    path.write_bytes(data)
    (read,) = store.reader.each_shard(RUN.run_id, {0: "hash0"})
    assert_same(read, make_shard(0))


def without_checksum(table: pa.Table, path: Path) -> None:
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"avss_checksum"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def without_row(table: pa.Table, path: Path) -> None:
    rewrite_file(path, table.slice(0, 0))


@pytest.mark.parametrize(
    ("damage", "of_run", "of_table"),
    [
        (without_checksum, "it has no checksum\navss score --fresh", None),
        (lambda table, path: rewrite_file(path, table, "two"), "not a number", "its schema version is b'two', not a"),
        (without_row, "it has 0 rows; a run has one", f"Cannot read run {RUN.run_id} .* it has no row"),
    ],
)
def test_a_damaged_row_of_a_run_is_told(tmp_path: Path, damage: Any, of_run: str, of_table: str | None) -> None:
    store = Store(tmp_path)
    whole_run(store)
    path = tmp_path / "runs" / f"run_id={RUN.run_id}" / "run.parquet"
    damage(pq.ParquetFile(path).read(), path)
    with pytest.raises(WarehouseError, match=of_run):
        store.reader.run(RUN.run_id)
    for reader in (store.reader, Warehouse(tmp_path)) if of_table else ():
        with pytest.raises(WarehouseError, match=of_table):
            reader.table("runs")


def test_files_of_other_names_do_not_count(tmp_path: Path) -> None:
    """Crashes leave hidden files, a tool that synchronizes folders leaves copies, and people make backups."""
    store = Store(tmp_path)
    whole_run(store)
    rows = dict.fromkeys(TABLES, 0)
    rows |= {"runs": 1, "scores": 3, "layer_stats": 15, "shard_stats": 15}
    assert {name: store.reader.table(name).num_rows for name in TABLES} == rows
    for file in list(tmp_path.rglob("*.parquet")):
        add_files_of_other_names(file)
    assert {name: store.reader.table(name).num_rows for name in TABLES} == rows
    counted = Warehouse(tmp_path).sql("SELECT count(*) FROM scores")
    assert counted.column(0).to_pylist() == [3]


def add_files_of_other_names(file: Path) -> None:
    """Put unfinished files, copies and a backup beside a file of a run."""
    for name in (".scores.parquet.99-abcd.tmp", ".hidden.parquet"):
        file.with_name(name).write_bytes(b"half")
    for copy in (f"{file.stem} (1)", f"{file.stem}.sync-conflict-20260101", f"Copy of {file.stem}"):
        shutil.copyfile(file, file.with_name(f"{copy}.parquet"))
    table = file.parents[1]
    backup = table / "backup" / file.parent.name
    backup.mkdir(parents=True)
    shutil.copyfile(file, backup / file.name)


def test_only_whole_runs_are_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store, "0456")  # which stays a string
    for run_id in ("no-row", "failed"):
        run = replace(RUN, run_id=run_id)
        write_shard(store, run, make_shard(0))
        store.write_layer_stats(run, LAYERS, make_shard(0).stats)
        store.write_rows("scores", run, score_rows())
    store.write_run(run_row("failed", "failed", error="out of memory"))
    for name in ("scores", "layer_stats", "shard_stats"):
        assert set(store.reader.table(name)["run_id"].to_pylist()) == {"0456"}
    assert store.reader.table("runs")["run_id"].to_pylist() == ["0456", "failed"]
    assert store.reader.table("scores", run_ids=["0456", "failed"]).num_rows == 3


def rewrite(path: Path, drop: list[str], version: int | str = SCHEMA_VERSION) -> None:
    rewrite_file(path, pq.ParquetFile(path).read().drop_columns(drop), version)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store)
    for path in tmp_path.rglob("*.parquet"):
        rewrite(path, [], SCHEMA_VERSION + 1)
    versions = f"schema {SCHEMA_VERSION + 1}, this one reads up to {SCHEMA_VERSION}"
    text = rf"newer avss_dist: {versions}.\nGet a newer avss_dist"
    for name in TABLES:
        with pytest.raises(WarehouseError, match=text):
            store.reader.table(name)
    with pytest.raises(WarehouseError, match=text):
        store.reader.run(RUN.run_id)
    with pytest.raises(WarehouseError, match=text):
        store.reader.read_layer_stats(RUN.run_id)
    with pytest.raises(WarehouseError, match=text):
        list(store.reader.each_shard(RUN.run_id, {0: "hash0"}))


@pytest.mark.parametrize("version", [1, 2])
def test_runs_of_unreleased_schemas_are_left_out_and_named(version: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store, "new")
    whole_run(store, "old")
    for path in tmp_path.rglob("run_id=old/*.parquet"):
        rewrite(path, [], version)
    warehouse = Warehouse(tmp_path)
    assert set(warehouse.scores()["run_id"].to_pylist()) == {"new"}
    (reason,) = warehouse.damaged.values()
    assert f"it has schema {version}, this avss_dist reads from 3 on: measure it again" in reason.reason
    assert [*store.reader.each_shard("old", {0: "hash0"})] == []
    with pytest.raises(WarehouseError, match=f"it has schema {version}"):
        store.reader.run("old")


def test_columns_that_a_file_lacks_are_null(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store, "new")
    whole_run(store, "old")
    old = "run_id=old"
    rewrite(tmp_path / "scores" / old / "scores.parquet", ["quality", "rank"])
    rewrite(tmp_path / "runs" / old / "run.parquet", ["notes"])
    rewrite(tmp_path / "layer_stats" / old / "layer_stats.parquet", ["input_mean"])
    scores = store.reader.table("scores").to_pylist()
    assert column(where(scores, run_id="old"), "quality") == [None, None, None]
    assert column(where(scores, run_id="new"), "quality") == ["ok", "ok", "ok"]
    assert (store.reader.run("old") or {})["notes"] is None
    assert store.reader.read_layer_stats("old")[0, "block"].input_mean == 0.0


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(WarehouseError, match="is not a warehouse: it has no runs folder"):
        Store(tmp_path).reader.table("runs")
    with pytest.raises(WarehouseError, match="~no-such-user/w is not a warehouse"):
        Store("~no-such-user/w").reader.table("runs")
    store = Store(tmp_path)
    store.storage.create()
    assert temporaries(tmp_path) == []
    with pytest.raises(WarehouseError, match="has no runs yet"):
        store.reader.table("scores")
    whole_run(store)
    with pytest.raises(WarehouseError, match="Did you mean 'scores'"):
        store.reader.table("score")
    with pytest.raises(WarehouseError, match="Did you mean 'quality'"):
        store.reader.table("scores", columns=["qualty"])
    with pytest.raises(WarehouseError, match=f"Did you mean '{RUN.run_id}'"):
        store.reader.read_layer_stats("tiny-0123456780")


def test_opening_touches_nothing_and_an_unwritable_place_is_refused_before_work(tmp_path: Path) -> None:
    assert repr(Warehouse("s3://KEY:SECRET@bucket/w?region=x")) == "Warehouse('s3://bucket/w?region=x')"
    Store(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below", Path("/proc/avss")):
        with pytest.raises(WarehouseError, match="Cannot write"):
            Store(place).storage.create()


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A warehouse with a whole run of one shard and another shard of run `begun`, on a disk that is now full."""
    store = Store(tmp_path)
    whole_run(store)
    write_shard(store, replace(RUN, run_id="begun"), make_shard(0))
    write_shard(store, replace(RUN, run_id="begun"), make_shard(1))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("avss_dist.warehouse.storage.write_file", refuse)
    return store


AGAIN = "Free some and run the same command again: "


def test_a_full_disk_tells_the_shards_of_the_run_that_is_written(full_disk: Store) -> None:
    with pytest.raises(StorageFull) as caught:
        write_shard(full_disk, replace(RUN, run_id="begun"), make_shard(2))
    assert caught.value.hint == f"{AGAIN}2 shards are kept."


def test_a_full_disk_tells_the_shards_of_a_run_that_is_begun_again(full_disk: Store) -> None:
    with pytest.raises(StorageFull) as caught:
        full_disk.write_unfinished_run(RUN.run_id)
    assert caught.value.hint == f"{AGAIN}1 shard is kept."


def test_a_full_disk_before_any_work_counts_no_shards(full_disk: Store) -> None:
    with pytest.raises(StorageFull) as caught:
        full_disk.storage.create()
    assert caught.value.hint == f"{AGAIN}what was measured is kept."


def test_what_drivers_left_long_ago_is_deleted_and_plans_of_others_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_unfinished_run("r")
    leftover = tmp_path / ".compacted.avss-89abcdef-4711-12-0123abcd.tmp"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    store.storage.create()
    assert not leftover.exists()
    (plan,) = (tmp_path / "runs").iterdir()
    assert plan.name == ".plan-r"


@pytest.mark.parametrize("name", ["plain", "with space", "percent%20", "é"])
def test_folders_and_file_uris_are_the_same_place_also_of_a_pickled_store(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    whole_run(Store(root.as_uri()))
    assert root.is_dir()
    copy = pickle.loads(pickle.dumps(Store(str(root))))
    assert copy.reader.table("scores").num_rows == 3


def test_two_drivers_write_the_same_run(tmp_path: Path) -> None:
    """Readers see a whole run at each moment, and no file of either is left over."""

    def write_repeatedly(_: int) -> None:
        for _ in range(5):
            whole_run(Store(tmp_path))

    store = Store(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        drivers = [pool.submit(write_repeatedly, number) for number in range(2)]
        while not all(driver.done() for driver in drivers):
            if store.reader.run(RUN.run_id):
                assert store.reader.table("scores").num_rows == 3
        assert [driver.result() for driver in drivers] == [None, None]
    assert temporaries(tmp_path) == []
    (read,) = store.reader.each_shard(RUN.run_id, {0: "hash0"})
    assert_same(read, make_shard(0))


def read_with_duckdb(folder: Path) -> list[str]:
    scan = f"read_parquet('{folder}/**/*.parquet', hive_partitioning = true)"
    return duckdb.execute(f"SELECT run_id FROM {scan}").df()["run_id"].tolist()


def read_with_polars(folder: Path) -> list[str]:
    return pl.read_parquet(folder)["run_id"].to_list()


def read_with_polars_by_pattern(folder: Path) -> list[str]:
    return pl.read_parquet(folder / "**/*.parquet", hive_partitioning=True)["run_id"].to_list()


def read_with_pandas(folder: Path) -> list[str]:
    return pd.read_parquet(folder)["run_id"].tolist()


@pytest.mark.parametrize("read", [read_with_duckdb, read_with_polars, read_with_polars_by_pattern, read_with_pandas])
@pytest.mark.parametrize(("name", "rows"), [("runs", 1), ("scores", 3), ("layer_stats", 15), ("shard_stats", 15)])
def test_other_readers_open_the_files(read: Callable[[Path], list[str]], name: str, rows: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole_run(store, "a-1")
    whole_run(store, "b-2")
    assert sorted(read(tmp_path / name)) == ["a-1"] * rows + ["b-2"] * rows


OTHER = RunIdentity(run_id="other-2", model="other", revision=None, family="llama")
IDS = [f"{number:020x}" for number in range(4)]


def cell_row(**changes: Any) -> dict[str, Any]:
    cell = {"task": "perplexity:a.txt", "metric": "loss", "drop": [1], "drop_parts": [], "part": 0}
    return cell | {"samples": [2.0], "weights": [3.0]} | changes


class CountingStorage(Storage):
    """Storage that notes which folders it lists and which files it reads."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.listed: list[str | None] = []
        self.opened: list[str] = []

    def files(self, table: str, run_id: str | None = None) -> dict[str, tuple[str, str]]:
        self.listed.append(run_id)
        return super().files(table, run_id)

    def read(self, path: str) -> Any:
        self.opened.append(Path(path).stem)
        return super().read(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "w")
    store.reader.storage = CountingStorage(tmp_path / "w")
    return store


def noted(store: Store) -> CountingStorage:
    assert isinstance(store.storage, CountingStorage)
    return store.storage


def test_an_evaluation_is_listed_once_and_its_own_cells_are_not_read(store: Store) -> None:
    store.cells.write(OTHER, IDS[3], [cell_row()])
    assert store.cells.ids(RUN.run_id) == set()
    for cell_id in IDS[:2]:
        store.cells.write(RUN, cell_id, [cell_row()])
        assert cell_id in store.cells.ids(RUN.run_id)
    assert noted(store).listed == [RUN.run_id]
    assert store.cells.read(RUN.run_id).num_rows == 2
    assert store.cells.read(OTHER.run_id).num_rows == 1
    assert noted(store).opened == []


def test_kept_rows_are_the_rows_of_the_files(store: Store, tmp_path: Path) -> None:
    """Null and NaN among them, in the order of cell ids, whatever the order of writing."""
    store.cells.ids(RUN.run_id)
    for cell_id, seconds in ((IDS[2], float("nan")), (IDS[0], None)):
        measured = cell_row(seconds=seconds, samples=[1.0, 2.5], weights=[0.0, 1.0])
        store.cells.write(RUN, cell_id, [measured, cell_row()])
    read = Store(tmp_path / "w").cells.read(RUN.run_id)
    kept = store.cells.read(RUN.run_id)
    assert kept.schema.equals(read.schema)
    assert read.schema.equals(SCHEMAS["cells"])
    assert repr(kept.to_pylist()) == repr(read.to_pylist())
    assert read["seconds"].null_count == 4
    table = Store(tmp_path / "w").reader.table("cells")
    assert repr(table.to_pylist()) == repr(read.to_pylist())


def test_cells_of_another_process_are_found_when_results_are_read(store: Store, tmp_path: Path) -> None:
    assert store.cells.ids(RUN.run_id) == set()
    another = Store(tmp_path / "w")
    another.cells.write(RUN, IDS[1], [cell_row(part=1)])
    assert store.cells.ids(RUN.run_id) == set()  # it would be measured again
    store.cells.write(RUN, IDS[0], [cell_row()])
    assert store.cells.read(RUN.run_id)["part"].to_pylist() == [0, 1]
    assert store.cells.ids(RUN.run_id) == {*IDS[:2]}
    assert noted(store).opened == [IDS[1]]
    store.cells.read(RUN.run_id)
    assert noted(store).opened == [IDS[1]]


def test_a_cell_measured_again_replaces_what_was_read(store: Store, tmp_path: Path) -> None:
    Store(tmp_path / "w").cells.write(RUN, IDS[0], [cell_row()])
    assert store.cells.read(RUN.run_id)["samples"].to_pylist() == [[2.0]]
    store.cells.write(RUN, IDS[0], [cell_row(samples=[5.0])])
    assert store.cells.read(RUN.run_id)["samples"].to_pylist() == [[5.0]]


def test_a_damaged_cell_is_left_out_and_noted(store: Store, tmp_path: Path) -> None:
    """A part of a file, and samples that are no numbers."""
    for cell_id in IDS[:2]:
        Store(tmp_path / "w").cells.write(RUN, cell_id, [cell_row()])
    path = Path(store.storage.path("cells", RUN.run_id, IDS[0]))
    path.write_bytes(path.read_bytes()[:100])
    assert store.cells.read(RUN.run_id).num_rows == 1
    assert IDS[0] in str(store.reader.damaged[RUN.run_id])
    store.cells.write(OTHER, IDS[0], [cell_row()])
    store.cells.write(OTHER, IDS[1], [cell_row(samples=[float("nan")])])
    assert store.cells.read(OTHER.run_id).num_rows == 1
    assert "samples" in str(store.reader.damaged[OTHER.run_id])
    store.cells.write(OTHER, IDS[0], [cell_row(samples=[float("nan")])])
    assert store.cells.read(OTHER.run_id).num_rows == 0


@pytest.mark.parametrize(
    ("model", "revision", "name"),
    [
        ("org/tiny", "c" * 40, f"org/tiny@{'c' * 40}"),
        ("run/checkpoint-5", "a" * 64, "run/checkpoint-5"),
        ("org/tiny", None, "org/tiny"),
    ],
)
def test_checkpoint_of_a_run_is_opened_at_its_commit(
    model: str, revision: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of a folder is no commit, whether the folder is still there or not; that of the hub is one."""
    monkeypatch.chdir(tmp_path)
    row = {"model": model, "revision": revision}
    assert checkpoint_name(row) == name
    Path(model).mkdir(parents=True)
    assert checkpoint_name(row) == name
