"""Encoding of rows and statistics as Parquet bytes, and decoding."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from avss_dist.core.errors import WarehouseError, require_known
from avss_dist.core.extras import package_hint
from avss_dist.core.values import JsonObject, TableRow
from avss_dist.stats.layer_stats import (
    EXPERT_FIELDS,
    HISTOGRAM_BINS,
    ExpertStats,
    LayerKey,
    LayerStats,
    ShardResult,
    StratumKey,
)
from avss_dist.warehouse.earlier import DROP_PARTS, has_numbered_removals, with_drop_parts
from avss_dist.warehouse.schema import SCHEMA_VERSION, SCHEMAS, TABLES, RunIdentity, columns_of

# Keys of the metadata of a file
_VERSION = b"avss_schema_version"
_HEADER = b"avss_header"
_CHECKSUM = b"avss_checksum"
_OLDEST = 3  # schema version that is still read; earlier ones were never released
_PREFIX = b"sha256:"
_UNSIGNED = _PREFIX + b"0" * 64
_SIGNATURE = re.compile(_CHECKSUM + rb"..(" + _PREFIX + rb"[0-9a-f]{64})", re.DOTALL)  # in a footer
UNSIGNED_METADATA = {_CHECKSUM: _UNSIGNED}
Columns = Mapping[str, Any]
"""Values of all rows by column: lists, or arrays of numpy or Arrow."""
_STATE = [f.name for f in fields(LayerStats) if f.name != "histogram"]
_COUNTS_BY_VALUE = ("abs_value", "abs_value_count")
_HEADER_FIELDS = [f.name for f in fields(ShardResult) if f.name not in ("strata", "rows", "experts")]


def _options_of_statistics() -> Mapping[str, object]:
    """Return options of the Parquet writer for tables of statistics.

    Floats seldom repeat, so a dictionary of them only costs time. Their bytes, split by significance, shrink well.
    """
    texts = []
    encodings = {}
    for field in SCHEMAS["shard_stats"]:
        if pa.types.is_string(field.type):
            texts.append(field.name)
        elif pa.types.is_floating(field.type):
            encodings[field.name] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
            encodings[f"{field.name}.list.element"] = "BYTE_STREAM_SPLIT"
    return {"use_dictionary": texts, "column_encoding": encodings}


_STATS_OPTIONS = _options_of_statistics()


def encode(name: str, run: TableRow, columns: Columns, shard: JsonObject | None = None) -> pa.Buffer:
    """Return a file of a table as bytes.

    Args:
        run: values that are the same in all rows, by column: ``run_id``, and others of the run.
        shard: header of a partial, beside its rows.
    """
    size = len(next(iter(columns.values())))
    columns = dict(columns)
    for column, value in run.items():
        columns[column] = [value] * size
    about = {"run_id": run["run_id"], **(shard or {})}
    header = {
        _VERSION: str(SCHEMA_VERSION),
        _HEADER: json.dumps(about),
        **UNSIGNED_METADATA,
    }
    fields = []
    for described in TABLES[name].columns[1:]:  # the first one, the run's id, is in the path alone
        metadata = None if shard else {"description": described.description}
        fields.append(pa.field(described.name, described.type, metadata=metadata))
    schema = pa.schema(fields, header)
    table = pa.table({field.name: columns[field.name] for field in schema}, schema=schema)
    if "histogram_bin" in columns:
        return to_file(table, **_STATS_OPTIONS)
    return to_file(table)


def encode_rows(name: str, run: TableRow, rows: Sequence[TableRow]) -> pa.Buffer:
    """Return a file of a table as bytes. None, NaN and missing values become null.

    Args:
        run: values that are the same in all rows, by column, as for `encode`.
        rows: the other columns of each row.

    Raises:
        WarehouseError: the table has no such column.
    """
    named: set[str] = set()
    for row in rows:
        named.update(row)
    for column in sorted(named):
        require_known("column", column, SCHEMAS[name].names, WarehouseError)
    return encode(name, run, columns_of(rows, SCHEMAS[name]))


def to_file(table: pa.Table, **options: object) -> pa.Buffer:
    """Return a table as the bytes of a Parquet file with a checksum, in place of any checksum in its metadata.

    Args:
        options: options of ``pyarrow.parquet.ParquetWriter``.
    """
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **UNSIGNED_METADATA})
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True, **options) as writer:
        writer.write_table(table, row_group_size=1_000_000)
    return signed(sink.getvalue())


def signed(data: pa.Buffer, *, footer_alone: bool = False) -> pa.Buffer:
    """Return a file whose metadata has `UNSIGNED_METADATA`, with its checksum in that place.

    Args:
        footer_alone: the checksum is of the footer, as `verify_footer` reads it.
    """
    view = memoryview(data)
    footer = _footer(view)
    match = _SIGNATURE.search(view, footer)
    assert match is not None
    start = footer if footer_alone else 0
    checksum = _PREFIX + hashlib.sha256(view[start:]).hexdigest().encode()
    before = view[: match.start(1)]
    after = view[match.end(1) :]
    return pa.py_buffer(b"".join((before, checksum, after)))


def _require_version(version: bytes | None) -> None:
    """Check a schema version.

    Raises:
        WarehouseError: it is newer than this package's.
        pa.ArrowInvalid: it is not a number, or older than all that are read.
    """
    try:
        number = int(version or 0)
    except ValueError:
        raise pa.ArrowInvalid(f"its schema version is {version!r}, not a number") from None
    if number > SCHEMA_VERSION:
        raise WarehouseError(
            f"Written by a newer avss_dist: schema {number}, this one reads up to {SCHEMA_VERSION}.",
            f"Get a newer avss_dist (git pull in its clone, or a newer wheel), and install it: {package_hint()}",
        )
    if number < _OLDEST:
        raise pa.ArrowInvalid(f"it has schema {number}, this avss_dist reads from {_OLDEST} on: measure it again")


def parse(data: pa.Buffer, schema: pa.Schema | None = None) -> pa.Table:
    """Return the rows of a file, with its metadata, or the columns of a schema that it has, of the types that it has.

    Args:
        schema: columns to read. Those whose type is a dictionary are read as dictionaries.

    Raises: as `open_file`.
    """
    file = open_file(data)
    if schema is None:
        return file.read(use_threads=False)
    stored = set(file.schema_arrow.names) - {"run_id"}
    names = [name for name in schema.names if name in stored]
    texts = [name for name in names if pa.types.is_dictionary(schema.field(name).type)]
    if texts:
        file = pq.ParquetFile(pa.BufferReader(data), metadata=file.metadata, read_dictionary=texts)
    return file.read(names, use_threads=False).replace_schema_metadata(None)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows in a schema, also those of an earlier version. Missing columns are null.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: a column has a type that cannot be cast.
    """
    if DROP_PARTS in schema.names and has_numbered_removals(table.schema):
        table = with_drop_parts(table)
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
        elif table[field.name].type != field.type:
            columns.append(table[field.name].cast(field.type))
        else:
            columns.append(table[field.name])
    return pa.table(columns, schema=schema)


def open_file(data: pa.Buffer) -> pq.ParquetFile:
    """Open a file whose content matches its checksum, which was computed with zeros in the checksum's place.

    Raises:
        WarehouseError: a newer avss_dist wrote it.
        OSError, pa.ArrowException: it does not match, has no checksum, or its schema is too old.
    """
    view = memoryview(data)
    match = _SIGNATURE.search(view, _footer(view))
    if match:
        _require_match(view, match)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"a name in it is not UTF-8: {error}") from None
    _require_version((file.metadata.metadata or {}).get(_VERSION))
    if not match:
        raise pa.ArrowInvalid("it has no checksum")
    return file


def verify_footer(path: Path) -> None:
    """Check the footer of a file against its checksum. Files without one are accepted: version 0.2.0 wrote none.

    Raises:
        OSError, pa.ArrowInvalid: it does not match.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        file.seek(max(0, size - 8 - int.from_bytes(file.read(4), "little")))
        footer = memoryview(file.read())
    if match := _SIGNATURE.search(footer):
        _require_match(footer, match)


def _footer(view: memoryview) -> int:
    """Return the place of the footer in a file."""
    return max(0, len(view) - 8 - int.from_bytes(view[-8:-4], "little"))


def _require_match(view: memoryview, match: re.Match[bytes]) -> None:
    digest = hashlib.sha256(view[: match.start(1)])
    digest.update(_UNSIGNED)
    digest.update(view[match.end(1) :])
    if match[1] != _PREFIX + digest.hexdigest().encode():
        raise pa.ArrowInvalid("its content does not match its checksum")


def encode_shard(run: RunIdentity, result: ShardResult) -> dict[str, pa.Buffer]:
    """Return the files of a shard by table, lossless to the last bit. The partial, from which runs resume, is last."""
    every_row = {**asdict(run), "shard_id": result.shard_id, "content_hash": result.content_hash}
    files = {}
    if result.rows:
        row_columns: dict[str, list[object] | pa.Array] = {}
        for name, values in result.rows.items():
            if values.ndim > 1:
                row_columns[name] = list(values)
            else:
                row_columns[name] = pa.array(values, from_pandas=True)
        files["row_stats"] = encode("row_stats", every_row, row_columns)
    if result.experts is not None:
        experts = expert_columns(result.layers, result.experts)
        files["shard_expert_stats"] = encode("shard_expert_stats", every_row, experts)
    header = {name: getattr(result, name) for name in _HEADER_FIELDS}
    files["shard_stats"] = encode("shard_stats", every_row, to_columns(result.layers, result.strata), header)
    return files


def _lists(arrays: Sequence[NDArray[Any]]) -> pa.ListArray:
    """Return arrays of one dtype as a column of lists."""
    ends = np.cumsum([len(array) for array in arrays])
    return pa.ListArray.from_arrays(np.append(0, ends).astype(np.int32), np.concatenate(arrays))


def to_columns(
    layers: Sequence[str], stats: Mapping[LayerKey, LayerStats] | Mapping[StratumKey, LayerStats]
) -> Columns:
    """Return a row for each (layer, site, stratum) in order, by column."""
    every: Mapping[Any, LayerStats] = stats
    rows = []
    for key in sorted(every):
        layer, site, *stratum = key
        state = every[key]
        bins = np.flatnonzero(state.histogram)
        row = {
            "layer": layer,
            "layer_name": layers[layer],
            "depth": (layer + 0.5) / len(layers),
            "site": site,
            "stratum": None,
            "histogram_bin": bins,
            "histogram_count": state.histogram[bins],
        }
        if stratum and stratum[0]:
            row["stratum"] = stratum[0]
        for name in _STATE:
            row[name] = getattr(state, name)
        rows.append(row)
    columns: dict[str, Any] = {}
    for name in ("layer", "layer_name", "depth", "site", "stratum", "histogram_bin", "histogram_count", *_STATE):
        values = [row[name] for row in rows]
        if values and isinstance(values[0], np.ndarray):
            columns[name] = _lists(values)
        else:
            columns[name] = values
    return columns


def to_strata(table: pa.Table) -> dict[StratumKey, LayerStats]:
    """Return statistics by (layer, site, stratum), the inverse of `to_columns`. Fields that a file lacks keep defaults.

    Raises:
        pa.ArrowInvalid: the rows are not statistics.
    """
    stats: dict[StratumKey, LayerStats] = {}
    try:
        cells = _cells_by_column(table)
        state_names = [name for name in _STATE if name in cells]
        for i in range(len(table)):
            histogram = np.zeros(HISTOGRAM_BINS, np.int64)
            histogram[cells["histogram_bin"][i]] = cells["histogram_count"][i]
            state = {name: cells[name][i] for name in state_names}
            stratum = ""
            if "stratum" in cells:
                stratum = cells["stratum"][i] or ""
            stats[cells["layer"][i], cells["site"][i], stratum] = LayerStats(histogram=histogram, **state)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise pa.ArrowInvalid(f"its rows are not statistics: {error}") from error
    return stats


def _cells_by_column(table: pa.Table) -> Mapping[str, list[Any]]:
    """Return the values of columns, lists as arrays. Columns that an older file lacks, so all null, are left out."""
    cells: dict[str, list[Any]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if len(column) and column.null_count == len(column):
            continue
        if pa.types.is_list(column.type):
            cells[name] = _arrays_of(column)
        else:
            cells[name] = column.to_pylist()
    return cells


def _arrays_of(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """Return the arrays of a column of lists.

    Raises:
        TypeError: a list is null.
    """
    arrays: list[NDArray[Any]] = []
    for chunk in column.chunks:
        if chunk.null_count:
            raise TypeError("a list is null")
        values = chunk.values.to_numpy()
        for start, end in pairwise(chunk.offsets.to_pylist()):
            arrays.append(values[start:end])
    return arrays


def decode_shard(data: pa.Buffer, run_id: str, sites: Collection[str] | None = None) -> ShardResult | None:
    """Return a partial, or None when it is damaged or not of this run.

    Args:
        sites: sites whose statistics are read, without their counts by value. By default, all is read.
    """
    try:
        table = parse(data)
        header = json.loads((table.schema.metadata or {}).get(_HEADER, b"{}"))
        if header.pop("run_id", None) != run_id or "layers" not in header:
            return None
        if sites is not None:
            table = table.filter(pc.is_in(table["site"], pa.array(sites, pa.string())))
            table = table.select([name for name in table.column_names if name not in _COUNTS_BY_VALUE])
        return ShardResult(**header | {"layers": tuple(header["layers"]), "strata": to_strata(table)})
    except (OSError, pa.ArrowException):
        return None


def expert_columns(layers: Sequence[str], experts: Mapping[int, ExpertStats]) -> Columns:
    """Return a row for each layer and expert in order, by column.

    Args:
        layers: module path of every layer, in order.
        experts: statistics by layer.
    """
    columns: dict[str, Any] = {"layer": [], "layer_name": [], "depth": [], "expert": []}
    for layer in sorted(experts):
        number = len(experts[layer].routed_tokens)
        columns["layer"] += [layer] * number
        columns["layer_name"] += [layers[layer]] * number
        columns["depth"] += [(layer + 0.5) / len(layers)] * number
        columns["expert"] += range(number)
    for name in EXPERT_FIELDS:
        parts = [getattr(experts[layer], name) for layer in sorted(experts)]
        values = np.concatenate(parts) if parts else np.zeros(0)
        columns[name] = pa.array(values, from_pandas=True)
    return columns


def to_experts(table: pa.Table) -> dict[int, ExpertStats]:
    """Return the statistics in rows of one run, or of one of its shards, by layer."""
    table = table.sort_by([("layer", "ascending"), ("expert", "ascending")])
    layers = table["layer"].to_numpy()
    columns = {name: table[name].to_numpy() for name in EXPERT_FIELDS}
    experts: dict[int, ExpertStats] = {}
    for layer in np.unique(layers):
        is_of_layer = layers == layer
        experts[int(layer)] = ExpertStats(**{name: values[is_of_layer] for name, values in columns.items()})
    return experts
