"""Checks of the rows of all files, before anything is computed from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avss_dist.core.errors import ConfigError, WarehouseError
from avss_dist.core.settings import Settings
from avss_dist.core.values import NewObject, TableRow
from avss_dist.warehouse.encoding import conform
from avss_dist.warehouse.schema import SCHEMAS, SCORE_AGAIN, TABLES, Column

_HEADLESS = re.compile(r"(?<!LMHead)(?<!DoubleHeads)(Model|Encoder)$")
_COMMIT_LENGTH = 40
"""Length of the hash of a commit of the hub. The hash of a local checkpoint is longer."""
RUN_COLUMNS = ["run_id", "status", "model", "num_layers", "num_tokens", "created_at", "settings"]
"""Columns of ``runs`` that are checked whenever a warehouse is read."""

Mask = NDArray[np.bool_]


def damaged_runs(name: str, table: pa.Table) -> dict[str, str]:
    """Return why rows of a table cannot be used: the first reason of each run, by its id.

    Args:
        name: name of the table.
        table: some of its columns, ``run_id`` among them.
    """
    reasons: dict[str, str] = {}
    for reason, wrong in _problems(name, table.combine_chunks()):
        # Most tables have no problem, and to look up the run ids takes longer than this.
        if wrong.any():
            for run_id in pc.unique(table["run_id"].filter(pa.array(wrong))).to_pylist():
                reasons.setdefault(run_id, reason)
    return reasons


def checked_rows(name: str, run_id: str, stored: pa.Table) -> pa.Table:
    """Return the rows of a file of one run in the schema of their table.

    Raises:
        pa.ArrowInvalid: one of them is damaged.
    """
    if name == "runs" and len(stored) != 1:
        raise pa.ArrowInvalid(f"it has {len(stored)} rows; a run has one")
    columns = {column: stored[column] for column in stored.column_names}
    table = conform(pa.table(columns | {"run_id": pa.repeat(run_id, len(stored))}), SCHEMAS[name])
    for reason in damaged_runs(name, table).values():
        raise pa.ArrowInvalid(reason)
    return table


def _problems(name: str, table: pa.Table) -> Iterator[tuple[str, Mask]]:
    """Yield the possible problems of rows of a table, each with a mask of the affected rows."""
    if name == "runs":
        _, place, counts = np.unique(table["run_id"].to_numpy(), return_inverse=True, return_counts=True)
        yield "it has several rows; a run has one", counts[place] > 1
    columns = {column.name: column for column in TABLES[name].columns}
    for column_name in table.column_names:
        column = columns[column_name]
        cells = table[column.name].combine_chunks()
        if column.name in TABLES[name].required:
            yield f"'{column.name}' has no value", _mask(cells.is_null())
        if column.as_long_as in table.column_names:
            length = pc.list_value_length(cells)
            expected = pc.list_value_length(table[column.as_long_as].combine_chunks())
            yield f"'{column.name}' is not as long as '{column.as_long_as}'", _mask(pc.not_equal(length, expected))
        yield f"'{column.name}' has a value that it cannot have", _invalid_cells(column, cells)


def _invalid_cells(column: Column, cells: pa.Array) -> Mask:
    """Return a mask of the rows whose value is not allowed in the column, or whose list has such a value or null."""
    if pa.types.is_list(cells.type):
        inside = pc.list_flatten(cells)
        bad = _mask(inside.is_null()) | _invalid_cells(column, inside)
        wrong = np.zeros(len(cells), bool)
        wrong[pc.list_parent_indices(cells).to_numpy()[bad]] = True
        return wrong
    if column.choices:
        is_choice = _mask(pc.is_in(cells, pa.array(column.choices)))
        return ~is_choice & ~_mask(cells.is_null())
    if column.pattern:
        return ~_mask(pc.match_substring_regex(cells, column.pattern), null=True)
    if column.bounds:
        low, high = column.bounds
        values = cells
        if pa.types.is_timestamp(cells.type):
            values = cells.cast(pa.int64())
        is_within = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))
        return ~_mask(is_within, null=True)
    if column.name == "settings":
        is_damaged = [_settings(text) is None for text in cells.to_pylist()]
        return np.array(is_damaged, bool)
    return np.zeros(len(cells), bool)


def _mask(cells: pa.Array, *, null: bool = False) -> Mask:
    return np.asarray(pc.fill_null(cells, null).to_numpy(zero_copy_only=False), bool)


def has_head(run: TableRow) -> bool:
    """Whether the model of a row of ``runs`` predicts the next token, by its class. Others cannot be evaluated."""
    return not _HEADLESS.search(run["architecture"] or "")


def settings_of(run: TableRow) -> NewObject:
    """Return the settings of a row of ``runs`` by name. Empty if it has none.

    Raises:
        WarehouseError: they are not a JSON object, or have invalid values.
    """
    settings = _settings(run["settings"])
    if settings is None:
        raise WarehouseError(f"The settings of run '{run['run_id']}' are damaged.", SCORE_AGAIN)
    return dict(settings)


def checkpoint_name(run: TableRow) -> str:
    """Return the name under which the checkpoint of a row of ``runs`` is opened: a path, or a hub id at its commit."""
    name = str(run["model"])
    if len(run["revision"] or "") == _COMMIT_LENGTH:
        return f"{name}@{run['revision']}"
    return name


@lru_cache(maxsize=10_000)
def _settings(text: str | None) -> NewObject | None:
    """Return settings from their JSON, None if it is damaged. Settings of other versions are returned too."""
    try:
        values = dict(json.loads(text or "{}").items())
        Settings(**{name: value for name, value in values.items() if name in Settings.__dataclass_fields__})
    except (ValueError, AttributeError, RecursionError, ConfigError):
        return None
    return values
