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
from support.command_line import avss, succeed
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
    (run,) = where(warehouse.runs().to_pylist(), run_id=RUNS[0])
    table = warehouse.scores(run_id=RUNS[0], site="block", recipe="pooled", threshold=1e-5)
    return run, table.sort_by("layer").to_pylist()


@pytest.mark.parametrize("width", [50, 80, 100, 132])
def test_the_layers_fit_and_every_number_is_whole(warehouse: Warehouse, width: int) -> None:
    run, rows = scores(warehouse)
    lines = drawn(layer_table(run, rows), width)
    for row in rows:
        (line,) = [line for line in lines if re.match(rf"│ +{row['layer']} ", line)]
        assert f" {row['avss_smoothed']:.4g} " in line
        assert f" {row['rank']} " in line
    _, _, hidden = " ".join(lines).partition("No room for: ")
    assert ("variance" in hidden) == (width <= 100)
    assert "rank" not in hidden


def test_what_computed_with_quantized_weights_is_told(warehouse: Warehouse) -> None:
    run, rows = scores(warehouse)
    lines = drawn(layer_table(run, rows), 132)
    assert "Weights:" not in " ".join(lines)
    run |= {"quantization": "fp8", "quantized_modules": "FP8Linear x 7 of transformers"}
    lines = drawn(layer_table(run, rows), 132)
    assert "Weights: fp8, computed by FP8Linear x 7 of transformers." in " ".join(lines)


@pytest.mark.parametrize("width", [60, 80, 132])
def test_pairs_show_whole_ids_at_any_width(warehouse: Warehouse, width: int) -> None:
    comparison = compare(warehouse, RUNS, threshold=PUBLISHED)
    text = "\n".join(drawn(comparison_tables(comparison, "by run", width=width), width))
    for run in RUNS:
        assert f" {run} " in text
    (correlation,) = comparison.pairs["spearman"].to_pylist()
    assert f" {correlation:.3f} " in text


def test_a_wide_query_is_a_block_for_each_record(warehouse: Warehouse) -> None:
    table = warehouse.sql("FROM runs")
    lines = drawn(plain_table(table.column_names, table.to_pylist()), 80)
    words = [line.split() for line in lines]
    for run in RUNS:
        assert ["run_id", run] in words
    headings = [line_words[0] for line_words in words if line_words]
    assert headings.count("tokens_per_second") == len(RUNS)


def test_a_narrow_query_is_a_table_of_rounded_numbers_to_the_right() -> None:
    rows: list[dict[str, Any]] = [{"name": "a", "share": 1 / 3, "n": 2}]
    rows.append({"name": "bb", "share": 1234567.0, "n": 10})
    rows.append({"name": None, "share": None, "n": None})
    lines = drawn(plain_table(["name", "share", "n"], rows), 80)
    assert lines[3] == "│ a    │    0.333333 │  2 │"
    assert lines[4] == "│ bb   │ 1.23457e+06 │ 10 │"
    assert lines[5] == "│      │             │    │"


def test_a_long_error_hides_no_row(warehouse: Warehouse) -> None:
    error = "CUDA out of memory. " * 40
    rows = [{"run_id": run, "status": "failed", "error": error} for run in RUNS]
    lines = drawn(plain_table(["run_id", "status", "error"], rows), 80)
    assert len(lines) < 80
    text = "\n".join(lines)
    for run in RUNS:
        assert run in text


def test_a_bar_in_a_cell_is_no_column_of_markdown(warehouse: Warehouse) -> None:
    done = avss("query", "-w", warehouse.root, "SELECT 'a|b' AS x, 1/3 AS y", "--format", "markdown")
    assert done.stdout == "| x | y |\n| --- | --- |\n| a\\|b | 0.333333 |\n"


@pytest.mark.parametrize("ending", all_of(["svg", "png", "html"], default=["svg"]))
def test_no_name_aborts_a_picture_or_steers(tmp_path: Path, ending: str) -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    file = tmp_path / f"layers.{ending}"
    write_scores(tmp_path, "hostile", values, model=f"org/{STEERING}", corpus=f"{STEERING}.txt", notes=[STEERING])
    write_scores(tmp_path, "other", values, family=STEERING)
    done = succeed("show", "-w", tmp_path, "--run", "hostile", "--run", "other", "-o", file)
    assert done.stderr == ""
    assert file.stat().st_size > 1000
    if ending == "svg":
        steering = [letter for letter in STEERING if not letter.isascii() or not letter.isprintable()]
        assert not set(steering) & set(file.read_text())


def test_scores_that_are_not_a_number_are_shown_as_none(tmp_path: Path) -> None:
    """This version writes null for them; an older one may not have."""
    write_scores(tmp_path, "a", [1.0, 2.0, 3.0, 4.0])
    (file,) = (tmp_path / "scores").rglob("*.parquet")
    table = pq.ParquetFile(file).read()
    values = pa.array(np.array([np.nan, 2.0, 3.0, 4.0]))
    place = table.column_names.index("avss_smoothed")
    rewrite_file(file, table.set_column(place, "avss_smoothed", values))
    assert "nan" not in succeed("show", "-w", tmp_path).stdout
    succeed("show", "-w", tmp_path, "-o", tmp_path / "a.svg")


def test_a_bar_says_how_long_it_has_taken_and_how_long_it_will() -> None:
    """Also while its only step goes on, and nothing else moves; the time that is left once it is known."""
    now = 0.0
    shown = rich_progress.Progress(get_time=lambda: now)
    shown.add_task("fitting", total=10)
    (task,) = shown.tasks
    time_column = TimeColumn()

    def text() -> str:
        return time_column.render(task).plain

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


THOUSAND_ROWS = pa.table({"row": range(1000, 2000)})
NUMBERS = [str(number) for number in range(1000, 2000)]


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_terminal_shows_the_ends_of_a_long_table(capsys: pytest.CaptureFixture[str], newest_first: bool) -> None:
    """Of a table whose newest rows come first, the first ones alone."""
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, color_system=None)
    write_table(THOUSAND_ROWS, "table", terminal, newest_first=newest_first)
    shown = re.findall(r"[12]\d{3}", written.getvalue())
    if newest_first:
        expected = NUMBERS[:40]
        hidden = "older rows"
    else:
        expected = NUMBERS[:20] + NUMBERS[-20:]
        hidden = "rows between the first and the last 20"
    assert shown == expected
    said = capsys.readouterr().out
    assert said == f"960 {hidden} are not shown; a file or a pipe gets all: --format csv > FILE.csv.\n"


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_pipe_gets_all_of_a_long_table(capsys: pytest.CaptureFixture[str], newest_first: bool) -> None:
    pipe = Console(file=io.StringIO(), force_terminal=False)
    write_table(THOUSAND_ROWS, "table", pipe, newest_first=newest_first)
    assert capsys.readouterr().out.split() == ["row", "----", *NUMBERS]


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
    for line in lines[2:-2]:
        assert line.index(" [1, 2]") == 200 + 2 + 6 + 1
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
            "seed": None,
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


def test_a_list_of_runs_of_seeds_has_a_column_of_seeds() -> None:
    table, _ = runs_list(run_rows(seed=3), 130)
    assert table["seed"].to_pylist() == [3, 3]


def test_a_very_narrow_list_of_runs_has_no_seeds() -> None:
    _, left_out = runs_list(run_rows(seed=3), 50)
    assert left_out[-1] == "seed"


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
