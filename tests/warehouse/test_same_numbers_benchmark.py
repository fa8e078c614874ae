"""The comparison of two warehouses, on the small one of version 0.1.0 and copies of it with one change each."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks.same_numbers import IGNORED, main
from support.warehouses import rewrite_file, unpack_released

pytestmark = pytest.mark.nightly

RUN = "tiny-0432ac7871"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_released(tmp_path_factory.mktemp("same") / "before")


@pytest.fixture
def after(before: Path, tmp_path: Path) -> Path:
    return shutil.copytree(before, tmp_path / "after")


def rewrite(root: Path, pattern: str, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in sorted(root.glob(pattern)):
        rewrite_file(path, change(pq.ParquetFile(path).read()))


def with_value(column: str, change: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    """Return a function that changes a column in the first row of a table that has a value there."""

    def changed(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        place = next(i for i, value in enumerate(values) if value is not None)
        values[place] = change(values[place])
        field = table.schema.field(column)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))

    return changed


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, list[str]], str]:
    """Return the cells of the printed table by the name of the warehouse's table, and the lines after it."""
    lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}, "\n".join(line for line in lines if not line.startswith("|"))


def test_a_warehouse_has_the_numbers_of_itself(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(before), str(before)]) == 0
    tables, notes = printed(capsys)
    digests = json.loads((Path(__file__).parent / "schema_3" / "expected.json").read_text())["digests"]
    assert {name: int(cells[0]) for name, cells in tables.items()} == {name: digests[name]["rows"] for name in digests}
    compared = {name: len(digests[name]["columns"].keys() - IGNORED.keys()) for name in digests}
    assert {name: int(cells[1]) for name, cells in tables.items()} == compared
    assert all(cells[2:] == ["-", "-", "-"] for cells in tables.values())
    assert notes == f"Columns not compared: {', '.join(IGNORED)}."


def next_float(value: float) -> float:
    return float(np.nextafter(value, np.inf))


@pytest.mark.parametrize(
    ("table", "column", "change", "difference"),
    [
        ("scores", "avss_smoothed", next_float, r"1 row, 1e-16"),
        ("scores", "avss_low", lambda value: None, "1 row"),
        ("scores", "sparsity", lambda value: math.nan, "1 row, inf"),
        ("layer_stats", "unit_sum", lambda value: [*value[:3], next_float(value[3]), *value[4:]], "1 row, 1e-16"),
        ("layer_stats", "near_zero", lambda value: value[1:], "1 row"),
        ("runs", "sites", lambda value: ["mlp"], "1 row"),
    ],
)
def test_one_planted_difference_is_found(
    before: Path,
    after: Path,
    capsys: pytest.CaptureFixture[str],
    table: str,
    column: str,
    change: Callable[[Any], Any],
    difference: str,
) -> None:
    rewrite(after, f"{table}/run_id={RUN}/*", with_value(column, change))
    assert main([str(before), str(after)]) == 1
    tables, _ = printed(capsys)
    different = {name: cells[2] for name, cells in tables.items() if cells[2] != "-"}
    assert different.keys() == {table}
    rows, _, size = different[table].removeprefix(f"{column} (").removesuffix(")").partition(", ")
    wanted_rows, _, wanted_size = difference.partition(", ")
    assert rows == wanted_rows and bool(size) == bool(wanted_size)
    assert not size or float(size) == pytest.approx(float(wanted_size), rel=2)


def test_nan_equals_nan_ignored_columns_may_differ_and_a_changed_key_leaves_rows_over(
    before: Path, after: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(before, tmp_path / "other")
    path = f"layer_stats/run_id={RUN}/*"
    for root, sign in ((after, 1.0), (other, -1.0)):
        rewrite(root, path, with_value("mean", lambda value, sign=sign: math.copysign(math.nan, sign)))
    for column in ("wall_seconds", "peak_memory_bytes"):
        rewrite(other, f"runs/run_id={RUN}/*", with_value(column, lambda value: value + 1))
    assert main([str(after), str(other)]) == 0
    assert main([str(before), str(other)]) == 1
    rewrite(other, f"scores/run_id={RUN}/*", with_value("site", lambda value: "mlp"))
    printed(capsys)
    assert main([str(after), str(other)]) == 1
    tables, notes = printed(capsys)
    assert all(cells[2] == "-" for cells in tables.values())
    assert "scores: rows only before: 1, only after: 1." in notes


def test_a_run_with_another_id_is_matched_by_what_it_measured(
    before: Path, after: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that only one version has does not keep them apart; it is a difference of ``settings``."""
    for path in sorted(after.glob(f"*/run_id={RUN}")):
        path.rename(path.with_name("run_id=tiny-new"))
    assert main([str(before), str(after)]) == 0
    _, notes = printed(capsys)
    assert f"Runs with another id: {RUN} is tiny-new." in notes and "Runs only" not in notes
    rewrite(after, "scores/run_id=tiny-new/*", with_value("avss", next_float))
    rewrite(
        after,
        "runs/run_id=tiny-new/*",
        with_value("settings", lambda value: json.dumps(json.loads(value) | {"new_setting": 1})),
    )
    assert main([str(before), str(after)]) == 1
    tables, _ = printed(capsys)
    assert tables["scores"][2].startswith("avss (1 row, ") and tables["runs"][2] == "settings (1 row)"


def test_columns_runs_and_tables_of_one_side_are_listed(
    before: Path, after: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no difference, but nothing in common is no equality."""
    for path in sorted(after.glob("*/run_id=experts-*")):
        shutil.rmtree(path)
    rewrite(after, "sparsity/*/*", lambda table: table.append_column("better", table["value"]).drop_columns("center"))
    shutil.rmtree(after / "experiments")
    assert main([str(before), str(after)]) == 0
    tables, notes = printed(capsys)
    assert tables["sparsity"][3:] == ["center", "better"]
    assert "Tables only before: experiments" in notes and "Runs only before: experts-c7ed961b36." in notes
    assert "Runs only after" not in notes
    others = [path.name for path in before.glob("*/run_id=*") if not path.name.startswith("run_id=experts")]
    shutil.copytree(before, tmp_path / "experts", ignore=shutil.ignore_patterns(*others))
    assert main([str(after), str(tmp_path / "experts")]) == 1
    with pytest.raises(SystemExit) as caught:
        main([str(before), str(tmp_path)])
    assert caught.value.code == 2
