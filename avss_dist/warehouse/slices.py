"""Groups of consecutive rows of a sorted table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def slices_by(table: pa.Table, names: Sequence[str]) -> list[tuple[dict[str, Any], int, int]]:
    """Return the key, the first row and the row after the last of each group of rows with equal values in some columns.

    Args:
        table: sorted by these columns.
        names: names of the columns.
    """
    if not len(table):
        return []
    columns = (table[name].combine_chunks().dictionary_encode() for name in names)
    codes = [column.indices.to_numpy() for column in columns]
    starts = np.flatnonzero(np.any([np.diff(code, prepend=-1) != 0 for code in codes], axis=0))
    keys = table.select(list(names)).take(starts).to_pylist()
    return list(zip(keys, starts.tolist(), [*starts[1:].tolist(), len(table)], strict=True))
