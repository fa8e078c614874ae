"""The matrix of a page: the ranking of every run by relative depth, with the properties to group and to search by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from avss_dist.analysis.compare import READING, size_label
from avss_dist.core.registry import FROM_ACTIVATIONS, SCORES
from avss_dist.core.text import basename, printable
from avss_dist.pruning.selection import PUBLISHED
from avss_dist.report.output import write_file
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import average_ranks
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.slices import slices_by

MIN_RUNS = 8  # of fewer, the charts show each
GROUPS = {"family": "family", "model": "model", "size": "size", "corpus": "text", "dtype": "dtype", "layers": "layers"}
"""Properties of runs by which the matrix can be grouped, and their titles."""
UNRANKED = -1  # in place of the rank of a layer without a score
STEPS = 100  # of a rank between the least and the most important layer


def published_scores(warehouse: Warehouse, run_ids: Collection[str] | None) -> pa.Table:
    """Return the rows of ``scores`` of runs, by default of all, at the published reading of AVSS, by run and layer."""
    where = pc.scalar(True)
    for name, value in zip(READING, PUBLISHED, strict=True):
        where = where & (pc.field(name) == value)
    table = warehouse.table("scores", run_ids=run_ids, where=where)
    return table.sort_by([("run_id", "ascending"), ("layer", "ascending")])


def matrix_data(
    runs: Sequence[Mapping[str, Any]], labels: Sequence[str], scores: pa.Table, drawn: Mapping[str, int]
) -> dict[str, Any]:
    """Return the data of the matrix, ready for JSON.

    Args:
        runs: rows of ``runs``.
        labels: the name of each run.
        scores: as `published_scores` returns them.
        drawn: the position of each run that has charts, by id.

    Returns:
        ``runs``: label, properties to group by and position among the drawn runs, if there is one; ``ranks``: by
        score, for each run the place of its layers from 0 (least important) to `STEPS`, `UNRANKED` without a score;
        ``groups``: the properties that differ, and their titles.
    """
    described = [{"label": label, **_properties(run)} for run, label in zip(runs, labels, strict=True)]
    for run, description in zip(runs, described, strict=True):
        description["drawn"] = drawn.get(run["run_id"])
    rows_of = [(key["run_id"], start, stop) for key, start, stop in slices_by(scores, ["run_id"])]
    ranks = {}
    for name in FROM_ACTIVATIONS:
        values = scores[SCORES[name].column].to_numpy()
        places = _places([values[start:stop] for _, start, stop in rows_of])
        by_run = {run_id: row for (run_id, _, _), row in zip(rows_of, places, strict=True)}
        ranks[name] = [by_run.get(run["run_id"], []) for run in runs]
    return {
        "runs": described,
        "ranks": {name: rows for name, rows in ranks.items() if any(rows)},
        "titles": {name: SCORES[name].title for name in FROM_ACTIVATIONS},
        "groups": {name: title for name, title in GROUPS.items() if len({run[name] for run in described}) > 1},
    }


def _properties(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties of a run by which it is grouped and found."""
    return {
        "family": printable(str(run["family"])),
        "model": printable(str(run["series"] or run["model"])),
        "size": size_label(run["num_parameters"]),
        "corpus": printable(basename(str(run["corpus"]))),
        "dtype": printable(str(run["dtype"])),
        "layers": run["num_layers"] or 0,
        "id": run["run_id"],
    }


def _places(scores: Sequence[Float64]) -> list[list[int]]:
    """Return the place of each layer of runs from 0 to `STEPS`; `UNRANKED` for NaN, and where one layer has a score.

    Args:
        scores: by run, float64[layers]. Runs with as many layers with a score are ranked at once.
    """
    known = [np.flatnonzero(~np.isnan(values)) for values in scores]
    sizes = np.array([len(layers) for layers in known])
    places = [[UNRANKED] * len(values) for values in scores]
    for size in np.unique(sizes[sizes > 1]):
        members = np.flatnonzero(sizes == size).tolist()
        ranks = average_ranks(np.array([scores[index][known[index]] for index in members]))
        steps = np.rint((ranks - 1) / (size - 1) * STEPS).astype(np.int64)
        for index, row in zip(members, steps.tolist(), strict=True):
            for layer, step in zip(known[index].tolist(), row, strict=True):
                places[index][layer] = step
    return places


def save_scores(scores: pa.Table, file: Path) -> None:
    """Write scores as a Parquet file.

    Raises:
        AvssError: the file cannot be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(scores, sink, compression="zstd")
    write_file(file, sink.getvalue().to_pybytes())
