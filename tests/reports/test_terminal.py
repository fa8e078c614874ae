"""Tables and progress in a terminal: tables fit, no number or id is cut, no name steers; the time left is told."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich import progress as rich_progress
from rich.console import Console
from support.command_line import avss
from support.rows import column, where
from support.tiers import all_of
from support.warehouses import PUBLISHED, activations, rewrite_file, stats_of, write_measured, write_scores

from avss_dist.analysis.comparison import compare
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.streams import USUAL, set_verbosity
from avss_dist.distillation.curve import Preparing
from avss_dist.evaluation.events import CellDone, CellsStarted, CellUnderway, MemoryNeeded
from avss_dist.partition.placement import Placement
from avss_dist.reports.output import write_table
from avss_dist.reports.terminal import progress as progress_module
from avss_dist.reports.terminal.progress import CellProgress, StepProgress, TimeColumn
from avss_dist.reports.terminal.runs import runs_list
from avss_dist.reports.terminal.scores import comparison_tables, layer_table
from avss_dist.reports.terminal.tables import plain_table
from avss_dist.runs.events import Pace, RunStarted, ShardMeasured
from avss_dist.warehouse.reader import Warehouse

RUNS = [f"SmolLM2-{size}M-Instruct-0123456789" for size in (135, 360)]
STEERING = "\x1b[31m\x00\u202eevil\u2066\x9b2J"


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    root = tmp_path_factory.mktemp("warehouse")
    for seed, run_id in enumerate(RUNS):
        write_measured(root, run_id, stats_of(activations(seed)), 8)
    return Warehouse(root)


def drawn(renderable: Any, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def scores(warehouse: Warehouse) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = warehouse.scores(run_id=RUNS[0], site="block", recipe="pooled", threshold=1e-5).sort_by("layer").to_pylist()
    return where(warehouse.runs().to_pylist(), run_id=RUNS[0])[0], rows


@pytest.mark.parametrize("width", [50, 80, 100, 132])
def test_the_layers_fit_and_every_number_is_whole(warehouse: Warehouse, width: int) -> None:
    run, rows = scores(warehouse)
    lines = drawn(layer_table(run, rows), width)
    for row in rows:
        (line,) = [line for line in lines if re.match(rf"│ +{row['layer']} ", line)]
        assert f" {row['avss_smoothed']:.4g} " in line
        assert f" {row['rank']} " in line
    hidden = " ".join(lines).partition("No room for: ")[2]
    assert ("variance" in hidden) == (width <= 100)
    assert ("rank" in hidden) is False


def test_what_computed_with_quantized_weights_is_told(warehouse: Warehouse) -> None:
    run, rows = scores(warehouse)
    assert "Weights:" not in " ".join(drawn(layer_table(run, rows), 132))
    quantized = {**run, "quantization": "fp8", "quantized_modules": "FP8Linear x 7 of transformers"}
    assert "Weights: fp8, computed by FP8Linear x 7 of transformers." in " ".join(
        drawn(layer_table(quantized, rows), 132)
    )


@pytest.mark.parametrize("width", [60, 80, 132])
def test_pairs_show_whole_ids_at_any_width(warehouse: Warehouse, width: int) -> None:
    comparison = compare(warehouse, RUNS, threshold=PUBLISHED)
    lines = drawn(comparison_tables(comparison, "by run", width=width), width)
    assert all(any(f" {run} " in line for line in lines) for run in RUNS)
    assert any(f" {comparison.pairs['spearman'][0].as_py():.3f} " in line for line in lines)


def test_a_wide_query_is_a_block_for_each_record(warehouse: Warehouse) -> None:
    table = warehouse.sql("FROM runs")
    lines = drawn(plain_table(table.column_names, table.to_pylist()), 80)
    for run in RUNS:
        assert f"run_id {run}" in [" ".join(line.split()) for line in lines]
    assert sum(line.startswith("tokens_per_second") for line in lines) == len(RUNS)


def test_a_narrow_query_is_a_table_of_rounded_numbers_to_the_right() -> None:
    names = ["name", "share", "n"]
    values = [("a", 1 / 3, 2), ("bb", 1234567.0, 10), (None, None, None)]
    rows = [dict(zip(names, row, strict=True)) for row in values]
    lines = drawn(plain_table(names, rows), 80)
    assert [line[1:-1].split("│") for line in lines[3:6]] == [
        [" a    ", "    0.333333 ", "  2 "],
        [" bb   ", " 1.23457e+06 ", " 10 "],
        ["      ", "             ", "    "],
    ]


def test_a_long_error_hides_no_row(warehouse: Warehouse) -> None:
    error = "CUDA out of memory. " * 40
    rows = [{"run_id": run, "status": "failed", "error": error} for run in RUNS]
    lines = drawn(plain_table(["run_id", "status", "error"], rows), 80)
    assert all(any(run in line for line in lines) for run in RUNS)
    assert len(lines) < 80
    done = avss("query", "-w", warehouse.root, "SELECT 'a|b' AS x, 1/3 AS y", "--format", "markdown")
    assert done.stdout == "| x | y |\n| --- | --- |\n| a\\|b | 0.333333 |\n"


@pytest.mark.parametrize("ending", all_of(["svg", "png", "html"], default=["svg"]))
def test_no_name_aborts_a_picture_or_steers(tmp_path: Path, ending: str) -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    file = tmp_path / f"layers.{ending}"
    write_scores(tmp_path, "hostile", values, model=f"org/{STEERING}", corpus=f"{STEERING}.txt", notes=[STEERING])
    write_scores(tmp_path, "other", values, family=STEERING)
    done = avss("show", "-w", tmp_path, "--run", "hostile", "--run", "other", "-o", file)
    assert done.exit_code == 0
    assert done.stderr == ""
    assert file.stat().st_size > 1000
    if ending == "svg":
        assert not {c for c in STEERING if not c.isascii() or not c.isprintable()} & set(file.read_text())


def test_scores_that_are_not_a_number_are_shown_as_none(tmp_path: Path) -> None:
    """This version writes null for them; an older one may not have."""
    write_scores(tmp_path, "a", [1.0, 2.0, 3.0, 4.0])
    (file,) = (tmp_path / "scores").rglob("*.parquet")
    table = pq.ParquetFile(file).read()
    values = pa.array(np.array([np.nan, 2.0, 3.0, 4.0]))
    table = table.set_column(table.schema.get_field_index("avss_smoothed"), "avss_smoothed", values)
    rewrite_file(file, table)
    done = avss("show", "-w", tmp_path)
    assert done.exit_code == 0
    assert "nan" not in done.stdout
    assert avss("show", "-w", tmp_path, "-o", tmp_path / "a.svg").exit_code == 0


def test_a_bar_says_how_long_it_has_taken_and_how_long_it_will() -> None:
    """Also while its only step goes on, and nothing else moves; the time that is left once it is known."""
    now = 0.0
    shown = rich_progress.Progress(get_time=lambda: now)
    shown.add_task("fitting", total=10)
    (task,), column = shown.tasks, TimeColumn()

    def text() -> str:
        return column.render(task).plain

    assert text() == "0:00:00"
    now = 75.0
    assert text() == "0:01:15"
    for seconds, said in ((90.0, "0:01:30, 0:13:30 left"), (100.0, "0:01:40, 0:06:40 left")):
        now = seconds
        shown.advance(task.id)
        assert text() == said
    now = 135.0
    assert text() == "0:02:15, 0:06:05 left"
    shown.update(task.id, completed=10)
    now = 4000.0
    assert text() == "0:02:15"


def test_the_pace_is_that_since_the_beginning() -> None:
    pace = Pace(1000.0, 100.0, now=0.0)
    assert pace.rate == 0
    assert pace.seconds_left(50.0) is None
    pace.reach(200.0, 10.0)
    pace.reach(300.0, 20.0)
    pace.reach(250.0, 30.0)  # no step back
    assert pace.done == 300.0
    assert pace.rate == 10.0
    assert pace.seconds_left(20.0) == 70.0
    assert pace.seconds_left(25.0) == 65.0


def test_units_that_come_together_make_one_pace() -> None:
    """Four workers, a unit of a minute each: after every round of four, the time left is that of the rounds left."""
    pace = Pace(72.0, now=0.0)
    for round_, left in ((60.0, 1020), (120.0, 960), (180.0, 900)):
        for late in (0.0, 0.4, 0.8, 1.0):
            pace.reach(pace.done + 1, round_ + late)
        assert pace.seconds_left(round_ + 1.0) == pytest.approx(left, rel=0.02)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_terminal_shows_the_ends_of_a_long_table_and_a_pipe_all(
    capsys: pytest.CaptureFixture[str], newest_first: bool
) -> None:
    table = pa.table({"row": range(1000, 2000)})
    output = Console(file=(written := io.StringIO()), force_terminal=True, color_system=None)
    write_table(table, "table", output, newest_first=newest_first)
    first = 40 if newest_first else 20
    shown = [int(number) for number in re.findall(r"[12]\d{3}", written.getvalue())]
    assert shown == [*range(1000, 1000 + first), *range(2000 - (40 - first), 2000)]
    hidden = "older rows" if newest_first else "rows between the first and the last 20"
    assert (
        capsys.readouterr().out == f"960 {hidden} are not shown; a file or a pipe gets all: --format csv > FILE.csv.\n"
    )
    write_table(table, "table", Console(file=io.StringIO(), force_terminal=False), newest_first=newest_first)
    assert capsys.readouterr().out.split() == ["row", "----", *map(str, range(1000, 2000))]


def test_a_row_of_a_long_table_in_a_pipe_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.reports.output.ROWS_AT_ONCE", 100)
    texts = ["a\nb", "x" * 200, *["short"] * 297, "longer than the first hundred " * 10, None]
    table = pa.table({"text": texts, "number": [0.5, *range(300)], "list": [[1, 2]] * 301})
    write_table(table, "table", Console(file=io.StringIO(), force_terminal=False))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 301
    assert lines[0].split() == ["text", "number", "list"]
    assert set(lines[1]) == {"-", " "}
    assert lines[2].split() == ["a", "b", "0.5", "[1,", "2]"]
    assert {line.index(" [1, 2]") for line in lines[2:-2]} == {200 + 2 + 6 + 1}
    assert lines[-2].startswith(str(texts[-2]))
    assert lines[-1].split() == ["299", "[1,", "2]"]


Lines = Callable[[], list[str]]
CELL: Any = SimpleNamespace(
    checkpoint=SimpleNamespace(name="org/a"), intervention=NO_INTERVENTION, task="perplexity:a.txt"
)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lines:
    """What was said since. A minute passes between two looks at the clock; an earlier command may have been quiet."""
    set_verbosity(USUAL)
    times = iter(range(0, 10_000_000, 60))
    monkeypatch.setattr("time.monotonic", lambda: float(next(times)))
    return lambda: [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]


def test_the_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 8.0)
    pace = Pace(1400.0, unit="tokens", now=0.0)
    assert pace.describe() == ""
    pace.reach(400.0)
    assert pace.describe() == ", 50 tokens/s, 20 s left"
    slow = Pace(18.0, unit="evaluations", now=-472.0)
    slow.reach(8.0)
    assert slow.describe() == ", 1 evaluations/min, 10 min 0 s left"


def test_an_evaluation_tells_how_far_it_is(lines: Lines) -> None:
    with CellProgress() as progress:
        progress(CellsStarted([CELL] * 20, 0))
        progress(CellUnderway(CELL, "Reading text", 0.5))
        for _ in range(10):
            progress(CellDone(CELL))
    said = lines()
    assert said[0] == "a: Reading text, 50%; 0 of 20 evaluated"
    assert re.fullmatch(r"a: 10 of 20 evaluated, [\d.]+ evaluations/min, .* left", said[-1])


def test_a_cell_that_takes_longer_than_the_others_has_the_time_of_its_own_step(lines: Lines) -> None:
    """A look at the clock is a minute: of two cells, the second one has taken many times as long as the first one."""
    with CellProgress() as progress:
        progress(CellsStarted([CELL] * 2, 0))
        progress(CellDone(CELL))
        for percent in range(1, 20):
            progress(CellUnderway(CELL, "Rounding layers to int8", percent / 100))
    assert re.search(r"Rounding layers to int8, 19%; 1 of 2 evaluated, .*\b\d+ h ", lines()[-1])


def test_steps_before_the_first_evaluation_have_names(lines: Lines) -> None:
    with CellProgress() as progress:
        progress(Preparing("reading the checkpoint"))
        progress(Preparing("reading the text", 0.5))
    assert lines() == ["reading the checkpoint", "reading the text, 50%"]


@pytest.mark.parametrize(
    ("total", "free", "said"),
    [
        (3 * 10**9, 8 * 10**9, ["Needs about 3 GB of memory (weights 3 GB); 8 GB are free."]),
        (10**8, 8 * 10**9, []),
        (10**8, 15 * 10**7, ["Needs about 100 MB of memory (weights 100 MB); 150 MB are free."]),
    ],
    ids=["large", "small", "most of what is free"],
)
def test_much_memory_is_said_before_it_is_taken(total: int, free: int, said: list[str], lines: Lines) -> None:
    with CellProgress() as progress:
        progress(MemoryNeeded(parts={"weights": total}, free=free))
    assert lines() == said


def test_shrinking_tells_how_far_each_step_is(lines: Lines) -> None:
    with StepProgress() as progress:
        progress(RunStarted("a", 1000, 0, Placement()))
        for _ in range(8):
            progress(ShardMeasured("a", 100))
        progress(CellsStarted([CELL] * 10, 0))
        progress(CellUnderway(CELL, "Repairing cut 1 of 2", 0.25))
        progress(CellDone(CELL))
    said = lines()
    assert any(re.fullmatch(r"scoring layers: 80%, .* left", line) for line in said)
    assert "repairing cut 1 of 2, 25%" in said
    assert any(line.startswith("evaluating: 10%, ") for line in said)


def test_the_teachers_writing_tells_how_far_it_is(lines: Lines) -> None:
    with StepProgress() as progress:
        for tenth in range(10):
            progress(Preparing("the teacher writes text", tenth / 10))
    said = lines()
    assert said[0] == "the teacher writes text"
    assert said[1].startswith("the teacher writes text, 10%, ")
    assert re.fullmatch(r"the teacher writes text, 90%, .* left", said[-1])


def test_lines_are_half_a_minute_apart(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    times = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(times)))
    with StepProgress() as progress:
        for part in range(100):
            progress(Preparing("the teacher writes text", part / 100))
    assert progress_module.LOG_SECONDS == 30
    assert 2 <= len(lines()) <= 10


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("kind", [CellProgress, StepProgress])
def test_each_note_is_printed_once(kind: type[StepProgress], capsys: pytest.CaptureFixture[str]) -> None:
    with kind() as progress:
        progress(CellsStarted([CELL, CELL], 0))
        for _ in range(2):
            progress(CellDone(CELL, ["[bold]a[/bold] is slow."]))
    assert capsys.readouterr().err.count("Note: [bold]a[/bold] is slow.") == 1


def run_rows(**columns: Any) -> pa.Table:
    """Two runs of one name on two texts, as `avss ls` has them."""
    texts = ("/data/texts/your.txt", "/data/texts/heldout.txt")
    rows = [
        {
            "run_id": f"SmolLM2-135M-Instruct-{number}1f1353f00",
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "status": "done",
            "corpus": corpus,
            "num_tokens": 16384,
            "dtype": "float32",
            "created_at": datetime(2026, 12, 1, 13, 40, tzinfo=UTC),
            "kept_shards": 16,
            "num_shards": 16,
            **columns,
        }
        for number, corpus in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize("width", range(80, 131, 10))
def test_a_list_of_runs_tells_model_text_and_run_first(width: int) -> None:
    table, _ = runs_list(run_rows(), width)
    assert table.column_names[:4] == ["model", "corpus", "run", "status"]
    assert table["model"].to_pylist() == ["SmolLM2-135M-Instruct"] * 2
    assert table["corpus"].to_pylist() == ["your.txt", "heldout.txt"]
    lines = drawn(plain_table(table.column_names, table.to_pylist()), width)
    assert len(lines) == 6
    assert max(map(len, lines)) <= width


def test_a_narrow_list_of_runs_has_dates_and_the_ends_of_ids() -> None:
    table, left_out = runs_list(run_rows(), 84)
    assert table["run"].to_pylist() == ["01f1353f00", "11f1353f00"]
    assert table["created"].to_pylist() == ["2026-12-01"] * 2
    assert left_out == ["dtype"]


def test_names_that_would_be_the_same_are_not_shortened() -> None:
    rows = run_rows().to_pylist()
    rows[1]["model"] = "other/SmolLM2-135M-Instruct"
    table, _ = runs_list(pa.Table.from_pylist(rows), 130)
    assert table["model"].to_pylist() == column(rows, "model")


def test_an_unfinished_run_has_its_stored_shards() -> None:
    table, _ = runs_list(run_rows(status="unfinished", kept_shards=3), 130)
    assert table["status"][0].as_py() == "unfinished, 3 of 16 shards"


@pytest.mark.parametrize("by", ["run", "recipe"])
def test_a_pair_is_one_line(warehouse: Warehouse, by: str) -> None:
    comparison = compare(warehouse, RUNS, by=by, threshold=PUBLISHED)
    labels = {run_id: f"model-{number}" for number, run_id in enumerate(RUNS)}
    lines = drawn(comparison_tables(comparison, "", labels, 110), 110)
    rows = [line for line in lines if line.startswith("│") and "model-" in line]
    assert len(rows) == len(comparison.pairs)


def test_the_columns_of_a_pair_are_explained(warehouse: Warehouse) -> None:
    text = " ".join(drawn(comparison_tables(compare(warehouse, RUNS, threshold=PUBLISHED), ""), 132))
    for name in ("shared lowest", "Jaccard", "by chance", "p"):
        assert f" {name}: " in f" {text}"
