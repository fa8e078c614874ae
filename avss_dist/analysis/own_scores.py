"""Scores of layers that people bring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.own_scores import VALUES, score_functions
from avss_dist.warehouse.reader import Warehouse


def own_scores(name: str, warehouse: Warehouse, run: Mapping[str, Any]) -> dict[int, float]:
    """Return the value of each layer of a run by a score that people bring; low is unimportant.

    Args:
        name: ``FILE.csv:COLUMN`` or ``FILE.parquet:COLUMN``, a table with a column ``layer``, of which the rows of this
            run or model count where it has a column ``run_id`` or ``model``; or the name of an entry point of the group
            `own_scores.GROUP`: a function of the run's statistics, ``dict[LayerKey, LayerStats]``, that returns a
            mapping from layer to value.

    Raises:
        QueryError: the file or the column does not exist, or a layer has more than one value.
    """
    if name.startswith(VALUES):
        return {int(layer): value for layer, value in json.loads(name.removeprefix(VALUES)).items()}
    if name in (functions := score_functions()):
        scores = functions[name].load()(warehouse.read_layer_stats(run["run_id"]))
        return {int(layer): float(value) for layer, value in scores.items()}
    file, _, column = name.rpartition(":")
    table = _read(Path(file))
    for required in ("layer", column):
        require_known(f"column of {file}", required, table.column_names, QueryError)
    for key in ("run_id", "model"):
        if key in table.column_names:
            table = table.filter(pc.equal(table[key], run[key]))
    layers = table["layer"].to_pylist()
    if len(set(layers)) < len(layers):
        raise QueryError(f"{file} has more than one row for a layer.", "Keep one, or name each row's run_id or model.")
    return dict(zip(layers, table[column].cast(pa.float64()).to_pylist(), strict=True))


def _read(file: Path) -> pa.Table:
    import pyarrow.csv
    import pyarrow.parquet

    read = pyarrow.csv.read_csv if file.suffix == ".csv" else pyarrow.parquet.read_table
    try:
        return read(file)
    except (OSError, pa.ArrowException) as error:
        raise QueryError(
            f"{file} cannot be read: {error}", "Expected FILE.csv:COLUMN or FILE.parquet:COLUMN."
        ) from error
