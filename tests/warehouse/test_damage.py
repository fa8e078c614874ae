"""Damage: each column is checked at its bounds, whole runs are read, and what is left out is named with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command_line import avss, files, mistake, succeed
from support.rows import where
from support.tiers import all_of, nightly
from support.warehouses import activations, rewrite_file, stats_of, write_every_table, write_measured

from avss_dist.analysis.findings import findings
from avss_dist.analysis.scorecard import score_cards
from avss_dist.core.errors import DamagedFile, WarehouseError
from avss_dist.plans.plan import read_plan
from avss_dist.read_commands import ls
from avss_dist.reports.page.page import report_page
from avss_dist.reports.publish import publish
from avss_dist.warehouse import compaction, reader
from avss_dist.warehouse.checks import checked_rows, damaged_runs, settings_of
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import EVALUATION_TABLES, MAX_INDEX, SCHEMAS, TABLES, RunIdentity
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store

NAMES = ("alpha-1", "beta-2", "gamma-3")
DAMAGED_TABLES = ("runs", "scores", "layer_stats")
SUM = "SELECT count(*), bit_xor(hash(t)) FROM {} AS t"  # of all cells, in any order of rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with three runs. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "w"
    for seed, name in enumerate(NAMES):
        write_measured(folder, name, stats_of(activations(seed)), 8, num_tokens=128)
    return folder


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / "w")


@pytest.fixture
def copied(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy whose runs are read from parts."""
    for module in (compaction, reader):
        monkeypatch.setattr(module, "MIN_RUNS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def file_of(root: Path, table: str) -> Path:
    return min((root / table / "run_id=beta-2").glob("*.parquet"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def changed(name: str, cell: Any, kind: pa.DataType | None = None) -> Callable[[Path], None]:
    """Put a cell into all rows of a column."""

    def change(file: Path) -> None:
        table = pq.ParquetFile(file).read()
        cells = pa.array([cell] * len(table), kind or table.schema.field(name).type)
        place = table.column_names.index(name)
        rewrite_file(file, table.set_column(place, name, cells))

    return change


def twice(file: Path) -> None:
    table = pq.ParquetFile(file).read()
    rewrite_file(file, pa.concat_tables([table, table]))


def without_row(file: Path) -> None:
    rewrite_file(file, pq.read_schema(file).empty_table())


DAMAGES = [
    ("runs", without_row),
    ("runs", truncate),
    ("runs", twice),
    ("runs", changed("num_layers", "many", kind=pa.string())),
    ("runs", changed("settings", json.dumps({"dtype": "int3"}))),
    ("scores", empty),
    ("scores", changed("layer", -1)),
    ("scores", changed("threshold", "x", kind=pa.string())),
    ("layer_stats", changed("near_zero", [1])),
]


@pytest.mark.parametrize(("table", "damage"), all_of(DAMAGES, [DAMAGES[1], DAMAGES[5], DAMAGES[8]]))
def test_one_damaged_run_stops_no_other(table: str, damage: Callable[[Path], None], root: Path) -> None:
    damage(file_of(root, table))
    warehouse = Warehouse(root)
    assert set(warehouse.table(table)["run_id"].to_pylist()) == {"alpha-1", "gamma-3"}
    assert list(warehouse.damaged) == ["beta-2"]
    if table == "scores":
        warehouse.sql(f"SELECT count(*), max(avss_smoothed) FROM {table}")
    (finding,) = where(findings(Warehouse(root)).to_pylist(), kind="unreadable")
    assert finding["run_id"] == "beta-2"
    assert finding["message"].startswith("This run cannot be read: ")


LEFT_OUT = "1 run cannot be read: beta-2 ("
COMMANDS = (
    "show -o x.svg --run *",
    "compare --allow-mismatch",
    "findings",
    "show --format csv --run *",
    "report -o x.html",
)


@pytest.mark.parametrize(
    ("table", "command"),
    [
        ("runs", "show --run alpha"),
        ("scores", "show --run beta"),
        *product(["scores"], COMMANDS),
        *nightly(*product(["runs"], COMMANDS)),
    ],
)
def test_every_command_names_what_it_left_out(
    table: str, command: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    truncate(file_of(root, table))
    done = succeed(*command.split(), "-w", root)
    assert LEFT_OUT in done.stderr


@pytest.mark.parametrize("table", ["runs", "scores"])
def test_a_query_names_what_it_left_out(table: str, root: Path) -> None:
    truncate(file_of(root, table))
    done = succeed("query", "-w", root, f"SELECT DISTINCT run_id FROM {table}")
    assert LEFT_OUT in done.stderr


@pytest.mark.parametrize("table", ["runs", "scores"])
def test_a_page_names_what_it_left_out(table: str, root: Path) -> None:
    truncate(file_of(root, table))
    assert "unreadable" in report_page(Warehouse(root))


@pytest.mark.parametrize("options", [("--threshold", "0.2"), ("--quantiles",)])
def test_statistics_that_are_damaged_leave_the_others_to_be_scored(options: tuple[str, ...], root: Path) -> None:
    change = changed("histogram_bin", [5000])
    change(file_of(root, "layer_stats"))
    done = succeed("show", "-w", root, *options, "--run", "*", "--format", "csv")
    assert LEFT_OUT in done.stderr
    assert "alpha-1," in done.stdout
    assert "gamma-3," in done.stdout
    assert "beta-2," not in done.stdout


@pytest.fixture
def ablated(root: Path) -> Path:
    """A copy whose damaged run has the loss without each layer, of which the scores are damaged."""
    loss = {"task": "ablation:text.txt", "metric": "loss", "drop_parts": [], "settings": "{}"}
    loss["created_at"] = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [{**loss, "drop": [], "value": 2.0}]
    for layer in range(8):
        rows.append({**loss, "drop": [layer], "value": 2.0 + (3 * layer % 8) / 8})
    identity = RunIdentity(run_id="beta-2-loss", model="org/beta-2", revision="main", family="llama")
    Store(root).write_rows("evaluations", identity, rows)
    truncate(file_of(root, "scores"))
    return root


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["findings --truth --run *", "report -o x.html", "publish site"])
def test_damaged_scores_of_an_ablated_run_are_named(
    command: str, ablated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ablated.parent)
    done = succeed(*command.split(), "-w", ablated)
    assert f"{LEFT_OUT}scores: " in done.stderr


def test_what_was_measured_of_a_run_with_damaged_scores_is_on_its_score_card(ablated: Path) -> None:
    warehouse = Warehouse(ablated)
    runs = where(warehouse.runs().to_pylist(), run_id="beta-2")
    assert score_cards(warehouse, runs)["score"].to_pylist() == ["loss"]


@pytest.mark.parametrize("by", ["loss", "avss", "last", "random"])
def test_a_plan_for_a_run_with_damaged_scores_names_their_file(by: str, ablated: Path, tmp_path: Path) -> None:
    said = mistake("plan", "-w", ablated, "--run", "beta-2", "--by", by, "-o", tmp_path / "plan.yaml")
    assert f"Cannot read {file_of(ablated, 'scores')}" in said


def test_a_plan_passes_over_a_newer_run_with_damaged_scores(root: Path, tmp_path: Path) -> None:
    runs = Warehouse(root).runs().sort_by([("created_at", "descending")])
    newest, next_newest, _ = runs["run_id"].to_pylist()
    truncate(root / "scores" / f"run_id={newest}" / "scores.parquet")
    succeed("plan", "-w", root, "--by", "avss", "-o", tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml").run_id == next_newest


@pytest.mark.parametrize(
    ("table", "command"),
    [
        ("scores", "avss score --fresh replaces a damaged file; avss rm removes its run."),
        ("shard_stats", "avss score --fresh replaces a damaged file; avss rm removes its run."),
        ("evaluations", "such as avss evaluate or avss ablate, writes it again from its cells."),
        ("cells", "such as avss evaluate or avss ablate, measures it again."),
        ("experiments", "avss run with the same job file writes the experiment again."),
        ("sparsity", "avss sparsify with the same options writes it again."),
        ("precision", "avss evaluate of the same precision plan writes it again."),
    ],
)
def test_the_command_that_replaces_a_damaged_file_is_that_of_its_table(table: str, command: str, root: Path) -> None:
    with pytest.raises(DamagedFile) as caught, Storage(root).reading(f"{root}/{table}/run_id=a/{table}.parquet"):
        raise pa.ArrowInvalid("no Parquet")
    assert command in str(caught.value.hint)


def test_damaged_runs_and_evaluations_are_told_with_their_commands(ablated: Path) -> None:
    truncate(ablated / "evaluations" / "run_id=beta-2-loss" / "evaluations.parquet")
    said = avss("query", "-w", ablated, "SELECT count(*) FROM scores, evaluations").stderr
    of_run, of_evaluation = said.splitlines()
    assert of_run.startswith(LEFT_OUT)
    assert of_evaluation.startswith("1 evaluation cannot be read: beta-2-loss (")
    assert of_evaluation.endswith(TABLES["evaluations"].replaced_by)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("table", ["scores", "layer_stats"])
def test_a_finished_run_without_its_file_is_noted(table: str, compacted: bool, copied: Path) -> None:
    if compacted:
        Warehouse(copied).compact()
    file_of(copied, table).unlink()
    warehouse = Warehouse(copied)
    rows = warehouse.table(table, columns=["run_id"])
    assert set(rows["run_id"].to_pylist()) == {"alpha-1", "gamma-3"}
    assert list(warehouse.damaged) == ["beta-2"]
    assert str(warehouse.damaged["beta-2"]) == f"{table}: its file is gone"


def test_digests_note_a_run_without_its_statistics(root: Path) -> None:
    file_of(root, "layer_stats").unlink()
    warehouse = Warehouse(root)
    warehouse.digests(NAMES)
    assert str(warehouse.damaged["beta-2"]) == "layer_stats: its file is gone"


def test_a_run_that_is_not_read_is_not_noted(root: Path) -> None:
    file_of(root, "scores").unlink()
    warehouse = Warehouse(root)
    warehouse.table("scores", run_ids=["alpha-1"])
    assert not warehouse.damaged


def test_a_file_that_is_mended_is_read_again(root: Path) -> None:
    file = file_of(root, "runs")
    whole = file.read_bytes()
    truncate(file)
    warehouse = Warehouse(root)
    assert warehouse.runs().num_rows == 2
    file.write_bytes(whole)
    assert warehouse.runs().num_rows == 3


@pytest.mark.nightly
def test_a_page_is_made_where_answers_of_paired_text_are_gone(tmp_path: Path) -> None:
    write_every_table(tmp_path)
    shutil.rmtree(tmp_path / "row_stats" / "run_id=a")
    (tmp_path / "row_stats" / "run_id=b" / "shard-00000.parquet").write_bytes(b"")
    page = report_page(Warehouse(tmp_path))
    for run in "ab":
        assert f"Statistics of rows of run &#39;{run}&#39; are missing." in page


def test_damage_that_comes_between_two_calls_is_noted(root: Path) -> None:
    warehouse = Warehouse(root)
    warehouse.digests(NAMES)
    truncate(file_of(root, "layer_stats"))
    warehouse.digests(NAMES)
    assert list(warehouse.damaged) == ["beta-2"]


def test_without_a_run_that_can_be_read_it_is_an_error(root: Path) -> None:
    for file in (root / "runs").rglob("*.parquet"):
        truncate(file)
    with pytest.raises(WarehouseError, match=r"Cannot read run .*-\d of .*\navss score --fresh replaces"):
        Warehouse(root).runs()


def test_damage_among_many_runs_is_not_copied(copied: Path) -> None:
    truncate(file_of(copied, "scores"))
    for _ in range(2):
        warehouse = Warehouse(copied)
        assert set(warehouse.scores()["run_id"].to_pylist()) == {"alpha-1", "gamma-3"}
        assert warehouse.sql("SELECT count(DISTINCT run_id) FROM scores").column(0).to_pylist() == [2]
        assert list(warehouse.damaged) == ["beta-2"]


def test_storage_that_fails_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("avss_dist.warehouse.reader.Warehouse._readable", refused)
    with pytest.raises(WarehouseError, match="Permission denied") as caught:
        Warehouse(root).runs()
    assert caught.value.hint == "Check the address, and who may read there."


LATER_COLUMNS = {
    "scores": ["quality", "avss_low", "lowest_set_probability", "update_variance_ratio"],
    "layer_stats": ["unit_sum", "unit_sum_sq", "relative_magnitude_sum", "input_m2", "zero_count"],
}


@pytest.fixture
def without_columns(tmp_path: Path) -> Path:
    """A warehouse of a run whose rows lack columns, as those of earlier versions do."""
    root = tmp_path / "old"
    write_measured(root, "old", stats_of(activations()), 8, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    for name, names in LATER_COLUMNS.items():
        (file,) = (root / name).rglob("*.parquet")
        table = pq.ParquetFile(file).read()
        rewrite_file(file, table.drop_columns(names))
    (file,) = (root / "runs").rglob("*.parquet")
    table = pq.ParquetFile(file).read()
    rewrite_file(file, table.select(["status", "model"]))
    return root


def test_every_column_may_be_null_where_it_is_not_required(without_columns: Path) -> None:
    assert Warehouse(without_columns).runs().schema.equals(SCHEMAS["runs"])


@pytest.mark.parametrize(
    "command",
    [
        "show",
        "findings --every",
        "report -o x.html",
        "plan --by avss -o plan.yaml",
        *nightly("show -o x.svg", "compare --by recipe", "show --threshold 0.2", "show --format csv"),
    ],
)
def test_commands_show_the_columns_that_there_are(
    command: str, without_columns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(without_columns.parent)
    done = succeed(*command.split(), "-w", without_columns)
    assert "cannot be read" not in done.stderr


# A byte that changes, as on a failing disk


def flips(file: Path, number: int) -> Iterator[int]:
    """Flip bits of one byte after the other, at evenly spaced offsets, and yield the offset."""
    data = file.read_bytes()
    for offset in np.linspace(0, len(data) - 1, number).astype(int).tolist():
        flipped = bytearray(data)
        flipped[offset] ^= 0x15
        file.write_bytes(flipped)
        yield offset
    file.write_bytes(data)


@pytest.mark.parametrize("table", DAMAGED_TABLES)
def test_a_flipped_byte_leaves_its_run_out(table: str, root: Path) -> None:
    others = Warehouse(root).table(table, run_ids=["alpha-1", "gamma-3"])
    for offset in flips(file_of(root, table), 15):
        warehouse = Warehouse(root)
        assert warehouse.table(table).equals(others), offset
        assert list(warehouse.damaged) == ["beta-2"], offset


@pytest.mark.parametrize("table", all_of(DAMAGED_TABLES, ["scores"]))
def test_a_flipped_byte_leaves_its_run_out_of_a_query(table: str, root: Path) -> None:
    query = SUM.format(table)
    others = Warehouse(root).sql(f"{query} WHERE run_id <> 'beta-2'")
    for offset in flips(file_of(root, table), 4):
        assert Warehouse(root).sql(query).equals(others), offset


@pytest.mark.parametrize(
    "table", all_of(sorted(TABLES.keys() - {*DAMAGED_TABLES}), ["evaluations", "cells", "shard_stats"])
)
def test_a_flipped_byte_of_any_table_leaves_its_run_or_evaluation_out(table: str, tmp_path: Path) -> None:
    write_every_table(tmp_path)
    first, second = ("e", "f") if table in EVALUATION_TABLES else ("a", "b")
    rows = Warehouse(tmp_path).table(table, run_ids=[second])
    (file,) = (tmp_path / table / f"run_id={first}").iterdir()
    for offset in flips(file, 5):
        warehouse = Warehouse(tmp_path)
        assert warehouse.table(table).equals(rows), offset
        assert list(warehouse.damaged) == [first], offset


def test_a_flipped_byte_of_an_unfinished_run_tells_nothing_wrong(tmp_path: Path) -> None:
    """It is listed all the same. Where a name is damaged, its value is missing."""
    store = Store(tmp_path)
    about = {"model": "org/m", "num_tokens": 1285, "num_shards": 87, "started_at": "2026-01-01T00:00:08+00:00"}
    store.write_unfinished_run("r", **about)
    (whole,) = store.reader.unfinished().to_pylist()
    for offset in flips(tmp_path / "runs" / ".plan-r", 400):
        (row,) = Warehouse(tmp_path).unfinished().to_pylist()
        for name, value in row.items():
            assert value in (None, whole[name]), offset


@pytest.mark.parametrize("text", ["", "[1]", "5", '{"started_at": 5}', '{"started_at": "2026-01-01"}', '{"model": 1}'])
def test_a_description_of_an_unfinished_run_that_is_none_tells_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".plan-r").write_text(text)
    listed = ls(warehouse=tmp_path).table()
    assert listed["status"].to_pylist() == ["unfinished"]
    (row,) = Warehouse(tmp_path).unfinished().to_pylist()
    assert row == dict.fromkeys(row) | {"run_id": "r", "kept_shards": 0}


@pytest.mark.parametrize("table", ["scores", *nightly("runs")])
def test_a_flipped_byte_of_a_part_changes_no_row(table: str, copied: Path) -> None:
    query = SUM.format(table)
    Warehouse(copied).compact()
    expected = Warehouse(copied).sql(query)
    (part,) = (copied / "compacted" / table).glob("*.parquet")
    for offset in flips(part, 4):
        warehouse = Warehouse(copied)
        assert warehouse.sql(query).equals(expected), offset
        assert not warehouse.damaged


@pytest.mark.nightly
@pytest.mark.parametrize("table", ["runs", "scores"])
def test_a_flipped_byte_of_a_part_in_the_cache_changes_no_row(table: str, copied: Path, tmp_path: Path) -> None:
    query = SUM.format(table)
    expected = Warehouse(copied).sql(query)
    (part,) = tmp_path.glob(f"cache/**/{table}/*.parquet")
    for offset in flips(part, 4):
        warehouse = Warehouse(copied)
        assert warehouse.sql(query).equals(expected), offset
        assert not warehouse.damaged


@pytest.mark.parametrize(("table", "copy"), [("runs", "runs"), ("scores", "scores"), ("layer_stats", "digests")])
def test_compaction_copies_no_damaged_run_and_names_it(table: str, copy: str, copied: Path) -> None:
    for _ in flips(file_of(copied, table), 3):
        done = succeed("compact", "-w", copied)
        assert LEFT_OUT in done.stderr
        (part,) = (copied / "compacted" / copy).glob("*.parquet")
        copied_runs = json.loads(pq.read_metadata(part).metadata[b"avss_files"])
        assert list(copied_runs) == ["alpha-1", "gamma-3"]
        shutil.rmtree(copied / "compacted")


def test_compaction_beside_a_damaged_run_keeps_its_part_however_often(copied: Path) -> None:
    truncate(file_of(copied, "scores"))
    Warehouse(copied).compact()
    parts = files(copied / "compacted" / "scores")
    assert parts
    for _ in range(3):
        Warehouse(copied).compact()
        assert files(copied / "compacted" / "scores") == parts


def test_copies_in_the_cache_beside_a_damaged_run_stay_however_often(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MAX_SMALL", 0)
    truncate(file_of(copied, "scores"))
    for _ in range(4):
        assert Warehouse(copied).table("scores")
        (_,) = tmp_path.glob("cache/**/scores/*.parquet")


@pytest.mark.parametrize("table", all_of(DAMAGED_TABLES, ["scores"]))
def test_a_damaged_run_is_not_published(table: str, root: Path, tmp_path: Path) -> None:
    next(flips(file_of(root, table), 2))
    warehouse = Warehouse(root)
    publish(warehouse, tmp_path / "site")
    assert list(warehouse.damaged) == ["beta-2"]
    for file in (tmp_path / "site" / "data").glob("*.parquet"):
        assert set(pq.read_table(file)["run_id"].to_pylist()) == {"alpha-1", "gamma-3"}, file.name


CANNOT = "has a value that it cannot have"


def reasons(table: str, **columns: list[Any]) -> dict[str, str]:
    """Return what is damaged of a table of runs r0, r1, ..., with a row of some columns for each."""
    first, *_ = columns.values()
    arrays = {"run_id": pa.array([f"r{i}" for i in range(len(first))])}
    for name, values in columns.items():
        arrays[name] = pa.array(values, SCHEMAS[table].field(name).type)
    return damaged_runs(table, pa.table(arrays))


@pytest.mark.parametrize(
    ("table", "name", "good", "bad"),
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
        ("cells", "drop", [[], [0, 5], [3, MAX_INDEX]], [[-1], [2, MAX_INDEX + 1], [None]]),
        (
            "cells",
            "drop_parts",
            [[], ["attention.0", "expert.7.12"]],
            [["attention"], ["mlp.1", "mlp.x"], [None], ["7"]],
        ),
        ("scores", "site", ["block", "query_input"], ["attic", ""]),
        ("scores", "recipe", ["pooled", "unit"], ["Pooled"]),
        ("scores", "threshold_kind", ["absolute", "rms"], ["relative"]),
        ("runs", "status", ["done", "failed"], ["dancing"]),
    ],
)
def test_values_up_to_their_bounds_are_good(table: str, name: str, good: list[Any], bad: list[Any]) -> None:
    assert reasons(table, **{name: good}) == {}
    mixed = []
    expected = {}
    for value in bad:
        mixed += [good[0], value]
        expected[f"r{len(mixed) - 1}"] = f"'{name}' {CANNOT}"
    assert reasons(table, **{name: mixed}) == expected


FIRST_TIME = datetime(1, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)


def microseconds(moment: datetime) -> int:
    """Return a moment as Parquet has it, in microseconds since 1970."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def test_times_that_python_has_are_good() -> None:
    assert reasons("runs", created_at=[FIRST_TIME, LAST_TIME, None]) == {}


def test_times_that_python_does_not_have_are_damage() -> None:
    numbers = pa.array([microseconds(FIRST_TIME) - 1, 0, microseconds(LAST_TIME) + 1], pa.int64())
    times = numbers.cast(SCHEMAS["runs"].field("created_at").type)
    damaged = damaged_runs("runs", pa.table({"run_id": ["a", "b", "c"], "created_at": times}))
    assert damaged == dict.fromkeys("ac", f"'created_at' {CANNOT}")


@pytest.mark.parametrize("text", [None, "", "{}", '{"layout": "packed"}', '{"of_a_later_version": 5}'])
def test_settings_are_a_json_object_of_values_that_settings_can_have(text: str | None) -> None:
    assert reasons("runs", settings=[text]) == {}
    row = {"run_id": "r", "settings": text}
    first = dict(settings_of(row))
    assert first.keys() <= {"layout", "of_a_later_version"}
    settings_of(row)["layout"] = "changed by who asks"
    assert settings_of(row) == first


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"batch_size": -1}', '{"dtype": "int3"}', "[" * 100_000],
    ids=["list", "half", "batch size", "dtype", "deep"],
)
def test_settings_that_no_run_can_have_are_damage(text: str) -> None:
    assert reasons("runs", settings=[text]) == {"r0": f"'settings' {CANNOT}"}
    with pytest.raises(WarehouseError, match="The settings of run 'r' are damaged"):
        settings_of({"run_id": "r", "settings": text})


@pytest.mark.parametrize(("table", "name"), [("runs", "status"), ("cells", "task")])
def test_a_required_column_may_not_be_empty(table: str, name: str) -> None:
    assert reasons(table, **{name: ["done", None, "done"]}) == {"r1": f"'{name}' has no value"}


@pytest.mark.parametrize(("table", "name"), [("runs", "family"), ("cells", "device")])
def test_other_columns_may_be_empty(table: str, name: str) -> None:
    assert reasons(table, **{name: [None, None]}) == {}


def test_lists_of_one_row_are_of_one_length() -> None:
    columns: dict[str, Any] = {"thresholds": [[1.0, 2.0], [1.0], [1.0, 2.0], []]}
    columns["near_zero"] = [[1, 2], [1, 2], [1], []]
    columns["histogram_bin"] = [[1], [1], [], []]
    columns["histogram_count"] = [[1], [1], [], [5]]
    assert reasons("layer_stats", **columns) == {
        "r1": "'near_zero' is not as long as 'thresholds'",
        "r2": "'near_zero' is not as long as 'thresholds'",
        "r3": "'histogram_count' is not as long as 'histogram_bin'",
    }


def test_a_cell_has_a_weight_for_each_sample() -> None:
    damage = reasons("cells", samples=[[1.0], [1.0]], weights=[[1.0], [1.0, 2.0]])
    assert damage == {"r1": "'weights' is not as long as 'samples'"}


def test_a_list_may_have_any_length_where_the_other_one_was_not_read() -> None:
    assert reasons("layer_stats", near_zero=[[1, 2]]) == {}


def test_a_run_has_one_row_and_its_first_problem_is_told() -> None:
    damage = reasons("runs", run_id=["a", "b", "a", "c"], status=["done", None, "x", "x"], num_layers=[1, 0, 1, 1])
    assert damage["a"] == "it has several rows; a run has one"
    assert damage["b"] == "'status' has no value"
    assert damage["c"] == f"'status' {CANNOT}"
    assert len(damage) == 3


def test_a_run_has_several_rows_of_scores() -> None:
    damage = reasons("scores", run_id=["a", "a", "b", "b"], layer=[0, 1, 0, -1])
    assert damage == {"b": f"'layer' {CANNOT}"}


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
