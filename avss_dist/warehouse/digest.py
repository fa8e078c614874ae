"""Digests of layer statistics: a short row for each layer and site, for analyses of many runs.

Most bytes of ``layer_stats`` are histograms and sums of single units. A digest has the numbers of a row, and of its
units the ones with the largest shares of the variance.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avss_dist.stats.unit_shares import largest_share, shares_of_elements, shares_of_means
from avss_dist.warehouse.checks import damaged_runs
from avss_dist.warehouse.schema import SCHEMAS

DIGEST_VERSION = 1  # of the formulas
_COPIED = (
    "run_id",
    "layer",
    "site",
    "count",
    "mean",
    "m2",
    "thresholds",
    "near_zero",
    "zero_count",
    "nonfinite_count",
    "max_abs",
    "unit_count",
    "token_count",
    "relative_magnitude_sum",
    "first_count",
    "first_mean",
    "first_m2",
)
_UNIT_LISTS = ("unit_sum", "unit_sum_sq")
SOURCE = pa.schema([SCHEMAS["layer_stats"].field(name) for name in (*_COPIED, *_UNIT_LISTS)])
"""Columns of ``layer_stats`` that a digest is made of."""
DIGEST = pa.schema(
    [
        *(SCHEMAS["layer_stats"].field(name) for name in _COPIED),
        ("mean_unit", pa.int64()),
        ("mean_unit_share", pa.float64()),
        ("element_unit", pa.int64()),
        ("element_unit_share", pa.float64()),
    ]
)
"""Columns of a digest: those of ``layer_stats``, and two units with the largest share of a variance.

``mean_unit`` is the unit with the largest share of the variance over unit means, ``element_unit`` the one with the
largest share of the variance over elements. They are null if a site has no units, or no variance.
"""


def digest(stats: pa.Table) -> pa.Table:
    """Return the digest of rows of ``layer_stats``, in their order, without the rows of damaged runs.

    Args:
        stats: rows with the columns `SOURCE`.
    """
    damaged = damaged_runs("layer_stats", stats)
    table = (stats.filter(~pc.field("run_id").isin(list(damaged))) if damaged else stats).combine_chunks()
    columns = {name: table[name] for name in _COPIED} | _largest_units(table)
    return pa.table([columns[field.name] for field in DIGEST], schema=DIGEST)


def _largest_units(table: pa.Table) -> dict[str, pa.Array]:
    """Return the four columns on units. Layers with equally many units are computed at once."""
    (starts, sums), (square_starts, squares) = (_lists(table, name) for name in _UNIT_LISTS)
    sizes, counts = np.diff(starts), table["unit_count"].to_numpy()
    sizes = np.where(np.diff(square_starts) == sizes, sizes, 0)
    units = {name: np.zeros(len(table), np.int64) for name in ("mean_unit", "element_unit")}
    shares = {name: np.full(len(table), np.nan) for name in units}
    for size in np.unique(sizes[(sizes > 0) & (counts > 0)]):
        rows = np.flatnonzero((sizes == size) & (counts > 0))
        of_rows = np.arange(size)
        unit_sums = sums[starts[rows, None] + of_rows]
        unit_squares = squares[square_starts[rows, None] + of_rows]
        tokens = counts[rows, None].astype(np.float64)
        for name, values in (
            ("mean_unit", shares_of_means(unit_sums, tokens)),
            ("element_unit", shares_of_elements(unit_sums, unit_squares, tokens)),
        ):
            shares[name][rows], units[name][rows] = largest_share(values)
    columns = {}
    for name, values in shares.items():
        undefined = ~np.isfinite(values)
        columns[name] = pa.array(units[name], pa.int64(), mask=undefined)
        columns[f"{name}_share"] = pa.array(values, pa.float64(), mask=undefined)
    return columns


def _lists(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the offsets of a column of lists, and the values of all lists."""
    column = table[name].combine_chunks()
    column = column if isinstance(column, pa.ListArray) else pa.concat_arrays(column.chunks)
    return column.offsets.to_numpy().astype(np.int64), column.values.to_numpy(zero_copy_only=False).astype(np.float64)
