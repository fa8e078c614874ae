"""Checks of rows: each column at its bounds, and which reason is told of which run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from avss_dist.core.errors import WarehouseError
from avss_dist.core.intervention import MAX_STORED
from avss_dist.warehouse.checks import checked_rows, damaged_runs, settings_of
from avss_dist.warehouse.schema import MAX_INDEX, SCHEMAS, TABLES

CANNOT = "has a value that it cannot have"


def reasons(name: str, **columns: list[Any]) -> dict[str, str]:
    """Of a table of runs r0, r1, ..., a row for each, of some columns."""
    length = len(next(iter(columns.values())))
    ids = columns.pop("run_id", [f"r{i}" for i in range(length)])
    types = {column: SCHEMAS[name].field(column).type for column in columns}
    return damaged_runs(name, pa.table({"run_id": ids} | {c: pa.array(v, types[c]) for c, v in columns.items()}))


@pytest.mark.parametrize(
    ("name", "column", "good", "bad"),
    [
        ("scores", "layer", [0, MAX_INDEX], [-1, MAX_INDEX + 1]),
        ("scores", "rank", [0, MAX_INDEX, None], [-1, MAX_INDEX + 1]),
        ("cells", "part", [0, MAX_INDEX], [-1, MAX_INDEX + 1]),
        ("scores", "depth", [0.0, 0.5, 1.0], [-1e-9, 1 + 1e-9, float("nan")]),
        ("experiments", "share", [0.0, 1.0], [-0.1, 1.1]),
        ("scores", "threshold", [0.0, 1e300], [-1e-9, 1e301, float("inf"), float("nan")]),
        ("runs", "num_layers", [1, MAX_INDEX, None], [0, MAX_INDEX + 1]),
        ("runs", "num_tokens", [0, 2**62, None], [-1, 2**62 + 1]),
        ("shard_stats", "shard_id", [0, 100_000], [-1]),
        ("expert_stats", "expert", [0, 7], [-1]),
        ("row_stats", "pair", [0, 7], [-1]),
        ("layer_stats", "nonfinite_count", [0, 2**62], [-1, 2**62 + 1]),
        ("layer_stats", "sequence_count", [0, None], [-1]),
        ("layer_stats", "thresholds", [[], [0.0, 1e300]], [[-1.0], [1.0, float("nan")], [None], [0.5, None]]),
        ("layer_stats", "histogram_bin", [[], [0, 2047]], [[-1], [3, 2048]]),
        ("cells", "drop", [[], [0, 5], [3, MAX_STORED]], [[-1], [2, MAX_STORED + 1]]),
        ("scores", "site", ["block", "query_input"], ["attic", ""]),
        ("scores", "recipe", ["pooled", "unit"], ["Pooled"]),
        ("scores", "threshold_kind", ["absolute", "rms"], ["relative"]),
        ("runs", "status", ["done", "failed"], ["dancing"]),
    ],
)
def test_values_up_to_their_bounds_are_good(name: str, column: str, good: list[Any], bad: list[Any]) -> None:
    assert reasons(name, **{column: good}) == {}
    mixed = [value for wrong in bad for value in (good[0], wrong)]
    expected = {f"r{2 * i + 1}": f"'{column}' {CANNOT}" for i in range(len(bad))}
    assert reasons(name, **{column: mixed}) == expected


def test_times_are_those_that_python_has() -> None:
    good = [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), None]
    assert reasons("runs", created_at=good) == {}
    first, last = ((moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) for moment in good[:2])
    bad = pa.array([first - 1, 0, last + 1], pa.int64()).cast(SCHEMAS["runs"].field("created_at").type)
    found = damaged_runs("runs", pa.table({"run_id": ["a", "b", "c"], "created_at": bad}))
    assert found == dict.fromkeys("ac", f"'created_at' {CANNOT}")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (None, True),
        ("", True),
        ("{}", True),
        ('{"layout": "packed"}', True),
        ('{"of_a_later_version": 5}', True),
        ("[1]", False),
        ("{", False),
        ('{"batch_size": -1}', False),
        ('{"dtype": "int3"}', False),
        ("[" * 100_000, False),
    ],
)
def test_settings_are_a_json_object_of_values_that_settings_can_have(text: str | None, good: bool) -> None:
    row = {"run_id": "r", "settings": text}
    assert (reasons("runs", settings=[text]) == {}) == good
    if not good:
        with pytest.raises(WarehouseError, match="The settings of run 'r' are damaged"):
            settings_of(row)
        return
    first = dict(settings_of(row))
    assert first.keys() <= {"layout", "of_a_later_version"}
    settings_of(row)["layout"] = "changed by who asks"
    assert settings_of(row) == first


def test_only_some_columns_may_be_empty() -> None:
    assert reasons("runs", status=["done", None, "done"], family=[None] * 3) == {"r1": "'status' has no value"}
    assert reasons("cells", task=["t", None], device=[None, None]) == {"r1": "'task' has no value"}


def test_lists_of_one_row_are_of_one_length() -> None:
    found = reasons(
        "layer_stats",
        thresholds=[[1.0, 2.0], [1.0], [1.0, 2.0], []],
        near_zero=[[1, 2], [1, 2], [1], []],
        histogram_bin=[[1], [1], [], []],
        histogram_count=[[1], [1], [], [5]],
    )
    assert found == {
        "r1": "'near_zero' is not as long as 'thresholds'",
        "r2": "'near_zero' is not as long as 'thresholds'",
        "r3": "'histogram_count' is not as long as 'histogram_bin'",
    }
    assert reasons("layer_stats", near_zero=[[1, 2]]) == {}, "what it is as long as was not read"
    assert reasons("cells", samples=[[1.0], [1.0]], weights=[[1.0], [1.0, 2.0]]) == {
        "r1": "'weights' is not as long as 'samples'"
    }


def test_a_run_has_one_row_and_its_first_problem_is_told() -> None:
    several = "it has several rows; a run has one"
    found = reasons("runs", run_id=["a", "b", "a", "c"], status=["done", None, "x", "x"], num_layers=[1, 0, 1, 1])
    assert found == {"a": several, "b": "'status' has no value", "c": f"'status' {CANNOT}"}
    assert reasons("scores", run_id=["a", "a", "b", "b"], layer=[0, 1, 0, -1]) == {"b": f"'layer' {CANNOT}"}


def test_the_rows_of_a_file_get_the_schema_of_their_table() -> None:
    stored = pa.table({"run_id": ["other", "other"], "task": ["t", "t"], "metric": ["acc", "f1"], "drop": [[1], []],
                       "part": [0, 1], "samples": [[1.0], []], "weights": [[1.0], []], "unknown": [1, 2]})  # fmt: skip
    rows = checked_rows("cells", "mine", stored)
    assert rows.schema.equals(SCHEMAS["cells"])
    assert rows["run_id"].to_pylist() == ["mine", "mine"] and rows["drop"].to_pylist() == [[1], []]
    assert rows["device"].to_pylist() == [None, None]
    wrong = stored.set_column(stored.column_names.index("part"), "part", pa.array([0, -1]))
    with pytest.raises(pa.ArrowInvalid, match=f"'part' {CANNOT}"):
        checked_rows("cells", "mine", wrong)
    with pytest.raises(pa.ArrowInvalid, match="'weights' has no value"):
        checked_rows("cells", "mine", stored.drop_columns(["weights"]))


def test_checks_name_columns_of_their_table() -> None:
    for table in TABLES.values():
        assert table.required <= {column.name for column in table.columns}
        assert all(pa.types.is_list(column.type) for column in table.columns if column.as_long_as)
