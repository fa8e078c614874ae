"""What the rows of the tables must be before anything is computed from them, whoever wrote the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avss_dist.errors import ConfigError, WarehouseError
from avss_dist.settings import EVERY_SITE, RECIPES, Settings
from avss_dist.stats.experts import EXPERT_FIELDS
from avss_dist.stats.histogram import HISTOGRAM_BINS
from avss_dist.warehouse.schema import DAMAGED, SCHEMAS

MOST_LAYERS = 100_000
_HEADLESS = re.compile(r"(?<!LMHead)(?<!DoubleHeads)(Model|Encoder)$")
_OF_EXPERTS = {"layer", "layer_name", "depth", "expert", *EXPERT_FIELDS} - {"router_entropy_sum"}
_REQUIRED: dict[str, set[str]] = {
    "runs": {"status", "model"},
    "scores": {"layer", "layer_name", "depth", "site", "recipe", "threshold", "threshold_kind"},
    "layer_stats": {
        *("layer", "layer_name", "depth", "site", "count", "mean", "m2", "thresholds", "near_zero"),
        *("nonfinite_count", "max_abs", "histogram_bin", "histogram_count"),
    },
    "shard_stats": {"shard_id", "content_hash"},
    "evaluations": {"task", "metric", "drop"},
    "cells": {"task", "metric", "drop", "part", "samples", "weights"},
    "experiments": {"method", "share", "task", "metric", "drop"},
    "sparsity": {
        *("sparsity_plan", "method", "target", "rule", "layer", "map", "site"),
        *("outputs", "inputs", "by", "value", "sparsity", "created_at"),
    },
    "stratum_stats": {"stratum", "layer", "site", "count", "thresholds", "near_zero", "nonfinite_count"},
    "expert_stats": _OF_EXPERTS,
    "shard_expert_stats": {"shard_id", *_OF_EXPERTS},
    "row_stats": {"row", "pair", "stratum", "layer", "site", "answer_tokens", "count", "near_zero"},
}
"""Columns that are never null, by table."""
_NAMES = {
    "status": ("done", "failed"),
    "site": EVERY_SITE,
    "recipe": RECIPES,
    "threshold_kind": ("absolute", "rms"),
}
_COUNT, _LAYERS, _SHARE, _LARGE = (0, 2**62), (0, MOST_LAYERS), (0, 1), (0, 1e300)
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("layer", "rank", "part", "drop"), _LAYERS),
    **dict.fromkeys(("depth", "share", "target"), _SHARE),
    **dict.fromkeys(
        ("num_tokens", "num_sequences", "sequence_length", "num_shards", "shard_id", "num_samples"), _COUNT
    ),
    **dict.fromkeys(("expert", "routed_tokens", "output_count"), _COUNT),
    **dict.fromkeys(("row", "pair", "prompt_tokens", "answer_tokens"), _COUNT),
    **dict.fromkeys(("count", "near_zero", "zero_count", "nonfinite_count", "token_count"), _COUNT),
    **dict.fromkeys(("histogram_count", "unit_count", "sequence_count"), _COUNT),
    **dict.fromkeys(("threshold", "thresholds"), _LARGE),
    "num_layers": (1, MOST_LAYERS),
    "histogram_bin": (0, HISTOGRAM_BINS - 1),
    "created_at": (-62_135_596_800_000_000, 253_402_300_799_999_999),  # the years 1 to 9999, which Python has
}
"""The least and the largest value of columns, or of what their lists hold."""
_ALIKE = {"near_zero": "thresholds", "histogram_count": "histogram_bin", "weights": "samples"}
"""Columns of lists, and others whose lists are as long."""

RUN_COLUMNS = ["run_id", "status", "model", "num_layers", "num_tokens", "created_at", "settings", "schema_version"]
"""The columns of ``runs`` that every reading of a warehouse checks."""

Mask = NDArray[np.bool_]


def damaged_runs(name: str, table: pa.Table) -> dict[str, str]:
    """Why rows of a table cannot be used, by run id; the first reason of each run.

    Args:
        name: of the table.
        table: some of its columns, ``run_id`` among them.
    """
    found: dict[str, str] = {}
    for reason, wrong in _problems(name, table.combine_chunks()):
        if wrong.any():
            for run_id in pc.unique(table["run_id"].filter(pa.array(wrong))).to_pylist():
                found.setdefault(run_id, reason)
    return found


def checked_rows(name: str, run_id: str, stored: pa.Table) -> pa.Table:
    """The rows of a file of one run in the schema of their table.

    Raises:
        pa.ArrowInvalid: one of them is damaged.
    """
    schema = SCHEMAS[name]
    columns = {"run_id": pa.repeat(run_id, len(stored)), **{n: stored[n] for n in stored.column_names if n != "run_id"}}
    cells = [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(len(stored), f.type) for f in schema]
    table = pa.table(cells, schema=schema)
    for reason in damaged_runs(name, table).values():
        raise pa.ArrowInvalid(reason)
    return table


def _problems(name: str, table: pa.Table) -> Iterator[tuple[str, Mask]]:
    """What may be wrong, and with which rows."""
    if name == "runs":
        ids = table["run_id"].to_pylist()
        yield "it has several rows; a run has one", np.array([ids.count(one) > 1 for one in ids], bool)
    for column in table.column_names:
        cells = table[column].combine_chunks()
        if column in _REQUIRED[name]:
            yield f"'{column}' has no value", _mask(cells.is_null())
        if (other := _ALIKE.get(column)) in table.column_names:
            lengths = pc.list_value_length(cells), pc.list_value_length(table[other].combine_chunks())
            yield f"'{column}' is not as long as '{other}'", _mask(pc.not_equal(*lengths))
        yield f"'{column}' has a value that it cannot have", _impossible(column, cells)


def _impossible(column: str, cells: pa.Array) -> Mask:
    """Rows whose value no column of that name has, or lists with such a value or with none."""
    if pa.types.is_list(cells.type):
        wrong, inside = np.zeros(len(cells), bool), pc.list_flatten(cells)
        bad = _mask(inside.is_null()) | _impossible(column, inside)
        wrong[pc.list_parent_indices(cells).to_numpy()[bad]] = True
        return wrong
    if column in _NAMES:
        return _mask(pc.invert(pc.is_in(cells, pa.array(_NAMES[column])))) & ~_mask(cells.is_null())
    if column in _BOUNDS:
        low, high = _BOUNDS[column]
        values = cells.cast(pa.int64()) if pa.types.is_timestamp(cells.type) else cells
        return ~_mask(pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high)), null=True)
    if column == "settings":
        return np.array([_settings(text) is None for text in cells.to_pylist()], bool)
    return np.zeros(len(cells), bool)


def _mask(cells: pa.Array, *, null: bool = False) -> Mask:
    return np.asarray(pc.fill_null(cells, null).to_numpy(zero_copy_only=False), bool)


def has_head(run: Mapping[str, Any]) -> bool:
    """Whether the model of a row of ``runs`` predicts the next token, by its class; only then it can be evaluated."""
    return not _HEADLESS.search(run["architecture"] or "")


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a row of ``runs``, by name; none where it has none.

    Raises:
        WarehouseError: they are no JSON object, or have values that settings cannot have.
    """
    settings = _settings(run["settings"])
    if settings is None:
        raise WarehouseError(f"The settings of run '{run['run_id']}' are damaged.", DAMAGED)
    return dict(settings)


@lru_cache(maxsize=10_000)
def _settings(text: str | None) -> dict[str, Any] | None:
    """Settings from their JSON; None where they are none. Other versions may have more of them than this one."""
    try:
        values = dict(json.loads(text or "{}").items())
        Settings(**{name: value for name, value in values.items() if name in Settings.__dataclass_fields__})
    except (ValueError, AttributeError, RecursionError, ConfigError):
        return None
    return values
