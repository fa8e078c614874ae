"""Files of earlier versions of this package: their rows in the form that this version writes.

Schema 3 had one column ``drop``, of numbers that stood for layers, sublayers and routed experts (see
`intervention.removal_number`). The rows of an experiment had their id in the name of their file alone.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.core.intervention import MAX_LAYERS, numbered_removal

DROP = "drop"
DROP_PARTS = "drop_parts"


def has_numbered_removals(stored: pa.Schema) -> bool:
    """Whether rows have numbers of sublayers and experts among their layers."""
    return DROP in stored.names and DROP_PARTS not in stored.names


def with_drop_parts(rows: pa.Table) -> pa.Table:
    """Return rows whose column ``drop`` has numbers of all removals with layers alone, and a column ``drop_parts``."""
    drop = rows[DROP]
    largest = pc.max(pc.list_flatten(drop)).as_py()
    names: list[list[str]] = [[] for _ in range(len(drop))]
    if largest is not None and largest >= MAX_LAYERS:
        layers = []
        for numbers, parts in zip(drop.to_pylist(), names, strict=True):
            layers.append(_without_parts(numbers, parts))
        rows = rows.set_column(rows.column_names.index(DROP), DROP, pa.array(layers, drop.type))
    return rows.append_column(DROP_PARTS, pa.array(names, pa.list_(pa.string())))


def _without_parts(numbers: list[int | None] | None, parts: list[str]) -> list[int | None] | None:
    """Return the numbers that stand for whole layers, and add the names of the others to a list.

    What is missing, in a damaged file, stays so: the checks of rows find it.
    """
    if numbers is None:
        return None
    layers: list[int | None] = []
    for number in numbers:
        removal = None if number is None else numbered_removal(number)
        if removal is None or isinstance(removal, int):
            layers.append(removal)
        else:
            parts.append(str(removal))
    return layers


def with_experiment_ids(rows: pa.Table, path: str) -> pa.Table:
    """Return rows of ``experiments``, with the name of their file as the id of those that have none."""
    place = rows.column_names.index("experiment_id")
    name = pa.scalar(PurePosixPath(path).stem)
    return rows.set_column(place, "experiment_id", pc.coalesce(rows["experiment_id"], name))
