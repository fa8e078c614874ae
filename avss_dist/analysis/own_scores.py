"""Scores that people bring: values by layer of a file, a mapping, or a function of another package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from avss_dist.core.errors import MAX_SUGGESTED, QueryError, first_names, require_known
from avss_dist.core.text import RedactedURI, count_of
from avss_dist.core.values import TableRow
from avss_dist.plans.criteria import LayerValues
from avss_dist.stats.catalog import OWN_FILES, OWN_VALUES, score_functions
from avss_dist.warehouse.reader import Warehouse

_PLACE = ("layer", "run_id", "model")
"""Columns of a table of scores that say of what a value is."""


def own_labels(names: Sequence[str]) -> dict[str, str]:
    """Return the labels for people of scores of their own, by name: ``values`` for a mapping, numbered if several."""
    mappings = [name for name in names if name.startswith(OWN_VALUES)]
    labels = {}
    for name in names:
        labels[name] = str(name)
        if name in mappings:
            labels[name] = "values" if len(mappings) == 1 else f"values {mappings.index(name) + 1}"
    return labels


def own_score(name: str, warehouse: Warehouse, run: TableRow) -> LayerValues:
    """Return the values of a user's own score for the layers of a run, low for unimportant layers.

    Args:
        name: ``FILE.csv:COLUMN`` or ``FILE.parquet:COLUMN``, a table with a column ``layer``, of which the rows of this
            run or model count where it has a column ``run_id`` or ``model``; or the name of an entry point of the group
            `catalog.SCORE_GROUP`: a function of the run's statistics, ``dict[LayerKey, LayerStats]``, that returns a
            mapping from layer to value.
        run: a row of ``runs``. Without its ``num_layers``, any number of layers may have a value.

    Returns:
        The values. A function may leave out layers. A table whose rows are all of other runs or models has none.

    Raises:
        QueryError: the file or the column does not exist, a layer has more than one value, or the layers are not those
            of the run.
    """
    if name.startswith(OWN_VALUES):
        values = _by_index(json.loads(name.removeprefix(OWN_VALUES)))
        _require_layers_of(run, values, "The mapping of `by`")
        return LayerValues(values=values)
    functions = score_functions()
    if name in functions:
        score = functions[name].load()
        values = _by_index(score(warehouse.read_layer_stats(run["run_id"])))
        # A function may leave out layers.
        every_layer = dict.fromkeys(range(run["num_layers"] or 0))
        _require_layers_of(run, {**every_layer, **values}, f"The score '{name}'")
        return LayerValues(values=values)
    values, is_of_several = _table_scores(RedactedURI(name).full, run)
    # A table of several models need not have this one.
    if values or not is_of_several:
        _require_layers_of(run, values, name)
    return LayerValues(values=values)


def _table_scores(name: str, run: TableRow) -> tuple[dict[int, float], bool]:
    """Return the values of a column by layer, and whether the table names the runs or models of its rows.

    Args:
        name: file and column, ``FILE.csv:COLUMN``.
    """
    if name.endswith(OWN_FILES):
        columns = []
        for column in _read_table(name).column_names:
            if column not in _PLACE:
                columns.append(f"{name}:{column}")
        raise QueryError(
            f"{name} names no column.", f"Name one: {first_names(columns, MAX_SUGGESTED) or 'it has none'}."
        )
    file, _, column = name.rpartition(":")
    table = _read_table(file)
    for required in ("layer", column):
        require_known(f"column of {file}", required, table.column_names, QueryError)
    keys = [key for key in ("run_id", "model") if key in table.column_names]
    for key in keys:
        table = table.filter(pc.equal(table[key], run[key]))
    layers = _numbers(table, "layer", pa.int64(), file).to_pylist()
    if None in layers:
        raise QueryError(f"{file} has a row without a layer.", "Write the index of its layer, from 0.")
    if len(set(layers)) < len(layers):
        raise QueryError(f"{file} has more than one row for a layer.", "Keep one, or name each row's run_id or model.")
    values = _numbers(table, column, pa.float64(), file).to_numpy()
    return _by_index(dict(zip(layers, values, strict=True))), bool(keys)


def _read_table(file: str) -> pa.Table:
    """Return the table in a file.

    Raises:
        QueryError: there is none.
    """
    is_local = "://" not in file
    if is_local and not Path(file).exists():
        raise QueryError(f"{file}: no such file.", "Check the name; a relative one starts in the working directory.")
    try:
        if Path(file).suffix == ".csv":
            return csv.read_csv(file)
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise QueryError(
            f"{file} cannot be read: {error}", "Expected FILE.csv:COLUMN or FILE.parquet:COLUMN."
        ) from error


def _numbers(table: pa.Table, column: str, kind: pa.DataType, file: str) -> pa.ChunkedArray:
    """Return a column as numbers of a type.

    Raises:
        QueryError: a value is no such number.
    """
    try:
        return table[column].cast(kind)
    except pa.ArrowException as error:
        expected = "indices of layers, from 0" if column == "layer" else "numbers"
        raise QueryError(f"The column '{column}' of {file} has other values than {expected}: {error}") from error


def _by_index(values: Mapping[int | str, float]) -> dict[int, float]:
    return {int(layer): float(value) for layer, value in values.items()}


def _require_layers_of(run: TableRow, values: Mapping[int, object], what: str) -> None:
    """Refuse values of other layers than those of a run.

    Args:
        what: noun for the score, for the message.

    Raises:
        QueryError: the layers differ.
    """
    number = run["num_layers"]
    if number is None or sorted(values) == list(range(number)):
        return
    place = f"{number} of {run['model']} (run {run['run_id']})"
    if len(values) != number:
        raise QueryError(
            f"{what} has values of {count_of(len(values), 'layer')}, not of the {place}.",
            "Is it a score of another model? Name each row's run_id or model in a table of several, and leave a value "
            "empty that is not known.",
        )
    raise QueryError(
        f"{what} has values of the layers {min(values)} to {max(values)}, not of the {place}.", "Layers count from 0."
    )
