"""Compare the values of two warehouses: table by table, run by run, column by column.

    python tests/benchmarks/same_numbers.py BEFORE AFTER

BEFORE and AFTER are folders. Their Parquet files are compared as they are stored, so a column that one version does not
write is listed and not filled in. Integers and texts must be equal, and floats equal to the bit. NaN equals NaN, and
null equals null. Runs are matched by run id; where the ids differ, by model, corpus, task and settings.

Exit code 1: a column of both sides differs, a matched run has rows that the other side lacks, or no row was compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

IGNORED = {
    "created_at": "date of writing",
    "seconds": "measured time",
    "wall_seconds": "measured time",
    "tokens_per_second": "measured time",
    "peak_memory_bytes": "measured memory of the machine",
    "device": "name of the machine's device",
    "versions": "versions of packages",
    "schema_version": "version of the tables",
    "run_id": "rows are matched by it; it is listed where it differs",
    "fingerprint": "the run id is the start of it",
}
"""Columns that may differ between two measurements of one thing, with the reason."""
KEYS = (
    *("layer", "site", "recipe", "threshold_kind", "threshold", "shard_id", "stratum", "row", "expert", "task", "part"),
    *(
        "position",
        "metric",
        "drop",
        "patch",
        "factor",
        "sparsity_plan",
        "method",
        "share",
        "sparsity",
        "seed",
        "repair",
        "map",
    ),
)
"""Columns that tell the rows of a run apart."""
MEASURED = {"scores": {"sparsity"}, "sparsity": {"sparsity"}}
"""Columns of a table that have the name of a key, and are measurements there."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The facts that tell runs apart where their ids differ.

    Attributes:
        settings: by name, as stored.
    """

    model: str | None
    corpus: str | None
    task: str | None
    settings: Mapping[str, Any]

    def matches(self, other: RunIdentity) -> bool:
        """Whether the other run measures the same: settings that only one version has do not count."""
        shared = self.settings.keys() & other.settings.keys()
        return (self.model, self.corpus, self.task) == (other.model, other.corpus, other.task) and all(
            self.settings[name] == other.settings[name] for name in shared
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of a column.

    Attributes:
        rows: number of rows whose values differ.
        relative: largest relative difference of two numbers; None where the values are no numbers, or where one side
            has none.
    """

    rows: int
    relative: float | None

    def __str__(self) -> str:
        rows = f"{self.rows:,} row{'s' if self.rows > 1 else ''}"
        return rows if self.relative is None else f"{rows}, {self.relative:.1e}"


@dataclass(frozen=True, kw_only=True)
class TableComparison:
    """Comparison of the rows that two warehouses have in one table, for the runs that both have.

    Attributes:
        rows: number of rows that both have.
        equal: names of the columns whose values are equal.
        different: by column.
        only_before, only_after: columns of one side.
        rows_before, rows_after: number of rows of one side.
    """

    rows: int
    equal: Sequence[str]
    different: Mapping[str, Difference]
    only_before: Sequence[str]
    only_after: Sequence[str]
    rows_before: int
    rows_after: int

    @property
    def same(self) -> bool:
        """Whether no shared column differs, and no row is on one side alone."""
        return not (self.different or self.rows_before or self.rows_after)


def read_tables(root: Path) -> dict[str, pa.Table]:
    """Read every table of a warehouse by name, with the columns that its files have and ``run_id``."""
    files: dict[str, list[pa.Table]] = defaultdict(list)
    for path in sorted(root.glob("*/run_id=*/*.parquet")):
        table = pq.ParquetFile(path).read().replace_schema_metadata(None)
        run_id = pa.array([path.parent.name.removeprefix("run_id=")] * len(table), pa.string())
        files[path.parent.parent.name].append(table.append_column("run_id", run_id))
    return {name: pa.concat_tables(parts, promote_options="permissive") for name, parts in files.items()}


def identities(tables: Mapping[str, pa.Table]) -> dict[str, RunIdentity]:
    """Return the identity of every run and evaluation by its id."""
    runs: dict[str, RunIdentity] = {}
    for name in ("runs", "evaluations", "cells"):
        if (table := tables.get(name)) is None:
            continue
        columns = {"run_id", "model", "corpus", "task", "settings"} & set(table.column_names)
        for row in table.select(sorted(columns)).to_pylist():
            facts = {fact: row.get(fact) for fact in ("model", "corpus", "task")}
            settings = json.loads(row.get("settings") or "{}")
            runs.setdefault(row["run_id"], RunIdentity(**facts, settings=settings))
    return runs


def match_runs(before: Mapping[str, pa.Table], after: Mapping[str, pa.Table]) -> dict[str, str]:
    """Return the id of a run after by its id before; a run that could be several others is left out."""
    ids, other_ids = run_ids(before), run_ids(after)
    runs, others = identities(before), identities(after)
    matched = {run_id: run_id for run_id in ids & other_ids}
    candidates = {
        run_id: [other for other in sorted(other_ids - ids) if other in others and runs[run_id].matches(others[other])]
        for run_id in sorted(ids - other_ids)
        if run_id in runs
    }
    claims = [other for choices in candidates.values() for other in choices]
    return matched | {
        run_id: choices[0]
        for run_id, choices in candidates.items()
        if len(choices) == 1 and claims.count(choices[0]) == 1
    }


def run_ids(tables: Mapping[str, pa.Table]) -> set[str]:
    """Return the ids of the runs and evaluations in any table."""
    return {run_id for table in tables.values() for run_id in pc.unique(table["run_id"]).to_pylist()}


def compare_tables(name: str, before: pa.Table, after: pa.Table, matched: Mapping[str, str]) -> TableComparison:
    """Compare a table of both sides over the matched runs."""
    before = before.filter(pc.is_in(before["run_id"], pa.array(matched.keys(), pa.string())))
    after = after.filter(pc.is_in(after["run_id"], pa.array(matched.values(), pa.string())))
    shared = [column for column in before.column_names if column in after.column_names]
    keys = [column for column in KEYS if column in shared and column not in MEASURED.get(name, ())]
    places = row_places(before, keys, shared, matched)
    other_places = row_places(after, keys, shared, {run_id: run_id for run_id in matched.values()})
    both = [key for key in places if key in other_places]
    before = before.take(pa.array((places[key] for key in both), pa.int64()))
    after = after.take(pa.array((other_places[key] for key in both), pa.int64()))
    equal, different = [], {}
    for column in (column for column in shared if column not in IGNORED):
        mask, relative = differing(before[column].combine_chunks(), after[column].combine_chunks())
        if mask.any():
            different[column] = Difference(rows=int(mask.sum()), relative=relative)
        else:
            equal.append(column)
    return TableComparison(
        rows=len(both),
        equal=equal,
        different=different,
        only_before=[column for column in before.column_names if column not in shared],
        only_after=[column for column in after.column_names if column not in shared],
        rows_before=len(places) - len(both),
        rows_after=len(other_places) - len(both),
    )


def row_places(
    table: pa.Table, keys: Sequence[str], columns: Iterable[str], run_ids: Mapping[str, str]
) -> dict[tuple[str, int], int]:
    """Return the index of each row by its run and its keys; rows alike in these are numbered in order of their values.

    Args:
        run_ids: id of the run on the other side by its id in the table.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(table.select(["run_id", *keys]).to_pylist()):
        row["run_id"] = run_ids[row["run_id"]]
        groups[json.dumps(row, default=str)].append(place)
    compared = sorted(column for column in columns if column not in IGNORED)
    for places in groups.values():
        if len(places) > 1:
            values = dict(zip(places, map(str, table.select(compared).take(places).to_pylist()), strict=True))
            places.sort(key=values.__getitem__)
    return {(key, number): place for key, places in groups.items() for number, place in enumerate(places)}


def differing(before: pa.Array, after: pa.Array) -> tuple[Mask, float | None]:
    """Return a mask of the rows whose values differ, and the largest relative difference of two numbers."""
    if before.type != after.type:
        before, after = (cast(column, other.type) for column, other in ((before, after), (after, before)))
    if pa.types.is_list(before.type) and pa.types.is_list(after.type):
        return differing_lists(before, after)
    if before.type != after.type or pa.types.is_map(before.type):
        pairs = zip(before.to_pylist(), after.to_pylist(), strict=True)
        return np.array([a != b for a, b in pairs], bool), None
    null, other_null = (column.is_null().to_numpy(zero_copy_only=False) for column in (before, after))
    mask = np.asarray(null != other_null)
    if not (pa.types.is_floating(before.type) or pa.types.is_integer(before.type)):
        return mask | pc.fill_null(pc.not_equal(before, after), False).to_numpy(zero_copy_only=False), None
    a, b = (pc.fill_null(column, pa.scalar(0, column.type)).to_numpy() for column in (before, after))
    if pa.types.is_floating(before.type):
        bits = np.dtype(f"i{a.dtype.itemsize}")
        wrong = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
    else:
        wrong = a != b
    numbers = wrong & ~mask
    return mask | wrong, relative_difference(a[numbers], b[numbers])


def cast(column: pa.Array, other: pa.DataType) -> pa.Array:
    """Return numbers in the type that holds those of both columns; other values as they are."""
    if pa.types.is_integer(column.type) and pa.types.is_integer(other):
        return column.cast(pa.int64())
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (column.type, other)):
        return column.cast(pa.float64())
    if pa.types.is_null(column.type):
        return column.cast(other)
    return column


def differing_lists(before: pa.Array, after: pa.Array) -> tuple[Mask, float | None]:
    """Return as `differing` for columns of lists: a row differs if its lists differ in length or in a value."""
    lengths, other_lengths = (
        pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False) for column in (before, after)
    )
    mask = np.asarray(lengths != other_lengths)
    comparable = np.flatnonzero(~mask)
    before, after = before.take(pa.array(comparable)), after.take(pa.array(comparable))
    inside, relative = differing(pc.list_flatten(before), pc.list_flatten(after))
    mask[comparable[pc.list_parent_indices(before).to_numpy()[inside]]] = True
    return mask, relative


def relative_difference(before: NDArray[Any], after: NDArray[Any]) -> float | None:
    """Return the largest relative difference of numbers that differ; infinity where one of the two is not finite."""
    if not len(before):
        return None
    a, b = before.astype(float), after.astype(float)
    with np.errstate(all="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    relative[~(np.isfinite(a) & np.isfinite(b))] = np.inf
    return float(np.nan_to_num(relative, nan=0.0, posinf=np.inf).max())  # 0 and -0 differ by nothing


def report_lines(compared: Mapping[str, TableComparison]) -> list[str]:
    """Return the comparison as a Markdown table, and a line for the rows that only one side has."""
    lines = ["| table | rows compared | columns equal | columns that differ | only before | only after |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    unmatched = []
    for name, table in compared.items():
        different = "; ".join(f"{column} ({difference})" for column, difference in table.different.items())
        sides = [", ".join(columns) for columns in (table.only_before, table.only_after)]
        cells = [name, f"{table.rows:,}", str(len(table.equal)), *(cell or "-" for cell in (different, *sides))]
        lines.append(f"| {' | '.join(cells)} |")
        if table.rows_before or table.rows_after:
            unmatched.append(f"{name}: rows only before: {table.rows_before:,}, only after: {table.rows_after:,}.")
    return [*lines, *unmatched]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of a warehouse")
    parser.add_argument("after", type=Path, help="folder of the warehouse to compare it with")
    options = parser.parse_args(arguments)
    before, after = read_tables(options.before), read_tables(options.after)
    for folder, tables in ((options.before, before), (options.after, after)):
        if not tables:
            parser.error(f"{folder} has no table: expected the folder of a warehouse")
    matched = match_runs(before, after)
    compared = {name: compare_tables(name, before[name], after[name], matched) for name in before if name in after}
    print("\n".join(report_lines(compared)))
    for side, tables, other in (("before", before, after), ("after", after, before)):
        if names := [name for name in tables if name not in other]:
            print(f"Tables only {side}: {', '.join(names)}.")
        known = matched if side == "before" else matched.values()
        if alone := sorted(run_ids(tables) - set(known)):
            print(f"Runs only {side}: {', '.join(alone)}.")
    if renamed := [f"{run_id} is {other}" for run_id, other in matched.items() if run_id != other]:
        print(f"Runs with another id: {', '.join(renamed)}.")
    print(f"Columns not compared: {', '.join(IGNORED)}.")
    return 0 if any(table.rows for table in compared.values()) and all(t.same for t in compared.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
