"""Commands that read a warehouse."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss_dist.cli.choose import (
    MOST_NAMED,
    choose_run,
    choose_run_ids,
    choose_runs,
    choose_scores,
    open_warehouse,
    print_table,
    score_rows,
)
from avss_dist.cli.program import interruptible
from avss_dist.core.errors import QueryError, WarehouseError
from avss_dist.core.names import REPAIR, ROW_START
from avss_dist.core.text import count_of, describe_count, describe_threshold, parse_threshold
from avss_dist.read_requests import (
    CompactRequest,
    CompareRequest,
    ContrastRequest,
    FindingsAtRequest,
    ListRequest,
    PublishRequest,
    QueryRequest,
    ReportRequest,
    ShowRequest,
)
from avss_dist.system.streams import console, emit, say

if TYPE_CHECKING:
    import pyarrow as pa

    from avss_dist.analysis.comparison import RankingComparison
    from avss_dist.warehouse.reader import Warehouse

LISTED = {
    "plans": """SELECT model, removals(drop) AS drop, count(DISTINCT task) AS tasks, max(created_at) AS evaluated_at
        FROM evaluations WHERE len(drop) > 0 AND layer IS NULL GROUP BY ALL ORDER BY evaluated_at DESC""",
    "evaluations": f"""WITH results AS (FROM evaluations WHERE NOT starts_with(task, '{ROW_START}')
            AND NOT starts_with(task, '{REPAIR}'))
        SELECT model, removals(drop) AS drop, rounding, task, metric, NULL AS layers, value, stderr, created_at
        FROM results WHERE layer IS NULL
        UNION ALL
        SELECT model, [], split_part(rounding, '@', 1), task, regexp_replace(metric, '(:.*|_[0-9]+)$', ''),
            count(DISTINCT layer), NULL, NULL, max(created_at)
        FROM results WHERE layer IS NOT NULL GROUP BY run_id, 1, 2, 3, 4, 5
        ORDER BY created_at DESC, task, metric, drop, rounding""",
}
"""SQL query of the lists of `avss ls` other than that of runs, newest first.

Measurements of single layers are a row for each task and metric. The machine's own tasks are left out.
"""
RUNS = ("run_id", "model", "status", "corpus", "num_tokens", "dtype", "created_at", "kept_shards", "num_shards")
"""Columns of the list of runs."""
DEFAULT_QUANTILES = (0.5, 0.9, 0.99)
UNFINISHED = "unfinished"  # the status of a run that has begun and has no row


def ls(request: ListRequest, format: str) -> None:
    """List runs (with stored shards of unfinished ones), evaluated sets of layers, or evaluations, newest first."""
    from avss_dist.report.output import write_table

    opened = open_warehouse(str(request.warehouse))
    table = _listed_runs(opened) if request.what == "runs" else opened.sql(LISTED[request.what])
    if request.what == "runs" and format == "table":
        table = _narrowed(_with_kept_shards(table), console().width)
    write_table(table, format, console(), newest_first=True)


def _listed_runs(opened: Warehouse) -> pa.Table:
    """Return the unfinished runs, then the others, newest first."""
    import pyarrow as pa
    import pyarrow.compute as pc

    unfinished = opened.unfinished()
    begun = unfinished.append_column("status", pa.array([UNFINISHED] * len(unfinished), pa.string()))
    begun = begun.append_column("created_at", pc.cast(unfinished["started_at"], pa.timestamp("us", "UTC")))
    try:
        ended = opened.table("runs", columns=[name for name in RUNS if name != "kept_shards"])
    except WarehouseError:
        if not unfinished:
            raise
        return begun.select(RUNS)
    kept = pc.if_else(pc.equal(ended["status"], "done"), ended["num_shards"], None)
    ended = ended.append_column("kept_shards", kept).select(RUNS).sort_by([("created_at", "descending")])
    return pa.concat_tables([begun.select(RUNS).cast(ended.schema), ended])


def _with_kept_shards(table: pa.Table) -> pa.Table:
    """Return a table of runs, with the number of stored shards in the status of unfinished runs."""
    import pyarrow as pa

    texts = []
    for row in table.select(["status", "kept_shards", "num_shards"]).to_pylist():
        total = f" of {row['num_shards']}" if row["num_shards"] else ""
        stored = f", {row['kept_shards']}{total} shards" if row["status"] == UNFINISHED else ""
        texts.append(f"{row['status']}{stored}")
    table = table.set_column(table.schema.get_field_index("status"), "status", pa.array(texts, pa.string()))
    return table.drop_columns(["kept_shards", "num_shards"])


def _narrowed(table: pa.Table, width: int) -> pa.Table:
    """Return a table of runs without the columns that say least, so that a row fits into a line of ``width`` cells."""
    from avss_dist.report.terminal.tables import describe_value

    columns = {name: [name, *map(describe_value, table[name].to_pylist())] for name in table.column_names}
    widths = {name: max(map(len, texts)) for name, texts in columns.items()}
    left_out = []
    for name in ("model", "status", "dtype", "created_at"):  # a run's id begins with its model
        if sum(widths.values()) + 3 * len(widths) + 1 > width and (
            name != "status" or {*columns[name][1:]} == {"done"}
        ):
            left_out.append(name)
            del widths[name]
    if left_out:
        say(f"Not shown, as lines would be too long: {', '.join(left_out)}. All columns: --format csv.")
    return table.select(list(widths))


def show(request: ShowRequest, format: str) -> None:
    """Show scores by layer, at any threshold, or draw them; the lowest 25% of layers are marked."""
    from avss_dist.report.output import PICTURES, printed_to

    output = None if request.output is None else Path(request.output)
    opened = open_warehouse(str(request.warehouse))
    runs = choose_runs(opened, request.run)
    shares = request.sparsity or (DEFAULT_QUANTILES if request.quantiles else ())
    if output and output.suffix.lower() in PICTURES and format == "table" and not (request.experts or shares):
        _draw_scores(opened, runs, request, output)
    else:
        with printed_to(output):
            if request.experts:
                _show_experts(opened, runs, format)
            elif shares:
                _show_quantiles(opened, runs, shares, request.site, format)
            else:
                _show_scores(opened, runs, request, format)
    others = opened.runs().num_rows - 1
    if others and not request.run and format == "table":
        emit(f"{others} more in {opened.root}: avss ls -w {opened.root}")


def _scores(opened: Warehouse, runs: Sequence[dict[str, Any]], request: ShowRequest) -> pa.Table:
    return choose_scores(opened, [*runs], request.site, request.recipe, request.threshold)


def _show_scores(opened: Warehouse, runs: Sequence[dict[str, Any]], request: ShowRequest, format: str) -> None:
    """Print a table of each run, and how far its counts are known."""
    from avss_dist.analysis.scorecard import describe_agreement, own_score
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.scores import describe_exactness, layer_table

    scores = _scores(opened, runs, request)
    if format != "table":
        return write_table(scores, format, console())
    scored = score_rows(scores)
    for row in runs:
        if layers := [layer for layer in scored if layer["run_id"] == row["run_id"]]:
            own = {name: own_score(name, opened, row) for name in request.by}
            console().print(layer_table(row, layers, own))
            for line in describe_agreement(opened, row, layers, own):
                emit(line)
            if note := describe_exactness(layers):
                emit(note)
    return None


def _draw_scores(opened: Warehouse, runs: Sequence[dict[str, Any]], request: ShowRequest, output: Path) -> None:
    """Draw AVSS and its baselines by depth, as a picture or page."""
    from avss_dist.report.chart import MAX_RUNS, layers_chart, save_chart

    if len(runs) > MAX_RUNS:
        raise QueryError(
            f"{len(runs):,} runs are too many for one chart: the maximum is {MAX_RUNS}.",
            "Name fewer with `run`; avss report draws the runs of a whole warehouse.",
        )
    save_chart(layers_chart(runs, score_rows(_scores(opened, runs, request))), output)
    emit(output)


def _show_experts(opened: Warehouse, runs: Sequence[Mapping[str, Any]], format: str) -> None:
    """Print a table of each run's experts, or their rows."""
    from avss_dist.analysis.experts import require_experts
    from avss_dist.report.experts import experts_section
    from avss_dist.report.terminal.tables import rendered

    run_ids = [row["run_id"] for row in runs]
    experts = [(row, require_experts(opened, row["run_id"])) for row in runs]
    sections = (experts_section(f"{row['model']}  ({row['run_id']})", row, layers) for row, layers in experts)
    print_table(format, lambda: opened.table("expert_stats", run_ids=run_ids), map(rendered, sections))


def _show_quantiles(
    opened: Warehouse, runs: Sequence[Mapping[str, Any]], shares: Sequence[float], site: str, format: str
) -> None:
    """Print the sizes of activations that given shares of the elements do not exceed."""
    import pyarrow.compute as pc

    from avss_dist.analysis.thresholds import quantiles
    from avss_dist.report.terminal.scores import quantiles_table

    table = quantiles(opened, runs, shares, [site])
    if not table.num_rows:
        raise QueryError(f"No statistics of site '{site}'.", "List sites: avss query 'SELECT run_id, sites FROM runs'")
    by_run = (table.filter(pc.field("run_id") == row["run_id"]).to_pylist() for row in runs)
    print_table(format, lambda: table, map(quantiles_table, filter(None, by_run)))


def query(request: QueryRequest, format: str) -> None:
    """Query a warehouse with SQL (DuckDB). It only reads, and only the warehouse."""
    from avss_dist.report.output import printed_to, write_table

    output = None if request.output is None else Path(request.output)
    if format == "parquet" and output is None and sys.stdout.isatty():
        raise QueryError("`format` parquet cannot be printed on a terminal.", "Name a file with `output`.")
    if not request.schema and not request.sql:
        raise QueryError("avss query needs a query.", "avss query 'FROM runs'; avss query --schema lists the tables.")
    with printed_to(output):
        if request.schema:
            _print_schema(format)
            return
        opened, sql = open_warehouse(str(request.warehouse)), str(request.sql)
        with console().status("Reading ...") if sys.stdout.isatty() else nullcontext():  # thousands of runs at first
            table = interruptible(lambda: opened.sql(sql))
        write_table(table, format, console())
        if not table.num_rows:
            say(f"No row.{_query_comment(sql)}")


def _query_comment(sql: str) -> str:
    """Return the comment of a ready-made query, which describes its rows, or an empty text for another query."""
    from avss_dist.warehouse.query import ready_queries

    lines = ready_queries().get(sql.removeprefix("@"), "").splitlines() if sql.startswith("@") else []
    comment = " ".join(line.removeprefix("-- ") for line in takewhile(lambda line: line.startswith("--"), lines))
    return f" {sql}: {comment}" if comment else ""


def _print_schema(format: str) -> None:
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.schema import schema_markdown, schema_page, schema_table

    if format == "table":
        console().print(schema_page())
    elif format == "markdown":
        emit(schema_markdown())
    else:
        write_table(schema_table(), format, console())


MAX_TABLED = 20_000  # pairs of which all are compared in full for a table on a terminal


def compare(request: CompareRequest, format: str) -> None:
    """Compare layer rankings between runs: how far they agree, or how they move along training, size or text."""
    if request.along:
        _follow(request, format)
    else:
        _compare_pairs(request, format)


def _follow(request: CompareRequest, format: str) -> None:
    """Print the curves of layer rankings along an axis."""
    from avss_dist.api.read import follow_runs
    from avss_dist.report.curves import curve_section
    from avss_dist.report.terminal.tables import rendered

    opened = open_warehouse(str(request.warehouse))
    curves = follow_runs(opened, choose_run_ids(opened, request.run), request)
    _say_reasons(curves.left_out)
    if request.output is not None:
        say(f"Ranks along {request.along}: {request.output}")
    shown = (rendered(*(curve_section(curve, "curve") for curve in followed.curves)) for followed in [curves])
    print_table(format, curves.table, shown)


def _compare_pairs(request: CompareRequest, format: str) -> None:
    """Print the agreement of pairs of runs, and the findings that speak against it."""
    from avss_dist.analysis.comparison import MAX_PAIRS
    from avss_dist.analysis.findings import findings as find
    from avss_dist.analysis.findings import of_rankings
    from avss_dist.api.read import compare_runs, named_threshold
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.agreement import comparison_tables, findings_list

    opened, by, score = open_warehouse(str(request.warehouse)), request.by, request.score
    names = choose_run_ids(opened, request.run)
    at = named_threshold(request.threshold)
    comparison = compare_runs(opened, names, request, max_listed=MAX_PAIRS if format != "table" else MAX_TABLED)
    _say_left_out(comparison)
    if request.output is not None:
        say(f"Map of all pairs: {request.output}")
    pairs = comparison.pairs
    if format != "table" and len(pairs) < comparison.number:
        say(f"Of {comparison.number:,} pairs, the {len(pairs):,} most and least alike are listed.")
    if format != "table":
        return write_table(pairs, format, console())
    fixed = {
        "score": score,
        "site": request.site,
        "recipe": request.recipe,
        "threshold": f"|x| < {describe_threshold(at.value, at.kind)}",
    }
    reading = " / ".join(text for name, text in fixed.items() if name != by)
    console().print(comparison_tables(comparison, f"by {by}  {reading}"))
    bearing = find(
        opened,
        sorted(set(names) - set(comparison.left_out)),
        threshold=at,
        site=None if by == "site" else request.site,
        recipe=None if by == "recipe" else request.recipe,
        rankings_alone=True,
    )
    console().print(findings_list(of_rankings(bearing, score if by != "score" else "avss")))
    say(f"avss findings -w {opened.root} lists what else speaks against each of these runs.")
    return None


def _say_left_out(comparison: RankingComparison) -> None:
    """Print which runs were not compared, and why."""
    if comparison.conditions:
        same = ", ".join(comparison.conditions)
        say(f"Only runs with the same {same} are compared with each other; --allow-mismatch compares all.")
    _say_reasons(comparison.left_out)


def _say_reasons(left_out: Mapping[str, str]) -> None:
    """Print the runs that were left out, by reason."""
    run_ids: dict[str, list[str]] = {}
    for run_id, reason in left_out.items():
        run_ids.setdefault(reason, []).append(run_id)
    for reason, names in run_ids.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        say(f"Left out: {', '.join(names[:MOST_NAMED])}{more}: {reason}.")


def findings(request: FindingsAtRequest, format: str) -> None:
    """List findings that speak against scores: they track depth, noise, rounding, single units, and so on."""
    from avss_dist.analysis.findings import findings as find
    from avss_dist.api.read import named_threshold
    from avss_dist.report.terminal.agreement import findings_list

    opened = open_warehouse(str(request.warehouse))
    if request.truth:
        _compare_with_truth(opened, request, format)
        return
    names = choose_run_ids(opened, request.run)
    table = find(
        opened,
        names if request.run else None,
        threshold=named_threshold(request.threshold),
        site=None if request.every else request.site,
        recipe=None if request.every else request.recipe,
    )
    print_table(format, lambda: table, map(findings_list, [table]))
    if format == "table" and not request.every:
        emit("--every also lists findings at other sites and recipes.")


def _compare_with_truth(opened: Warehouse, request: FindingsAtRequest, format: str) -> None:
    """Print how far each score of a run agrees with the ground truth."""
    from avss_dist.analysis.scorecard import best_readings, score_cards
    from avss_dist.report.scorecards import scorecard_sections
    from avss_dist.report.terminal.tables import rendered

    cards = score_cards(opened, choose_runs(opened, request.run, every=True), request.by)
    cards = cards if request.every else best_readings(cards)
    print_table(format, lambda: cards, (rendered(*scorecard_sections(table)) for table in [cards]))


def contrast(request: ContrastRequest, format: str) -> None:
    """Contrast hallucinated with truthful answers, layer by layer, with controls; for a run on paired text."""
    from avss_dist.analysis.contrast import contrast as contrast_run
    from avss_dist.report.contrasts import contrast_section
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.tables import rendered

    opened = open_warehouse(str(request.warehouse))
    value, kind = parse_threshold(request.threshold)
    result = contrast_run(
        opened,
        choose_run(opened, request.run),
        site=request.site,
        recipe=request.recipe,
        threshold=value,
        threshold_kind=kind,
        hallucinated=request.hallucinated,
        truthful=request.truthful,
    )
    if format == "table":
        label = f"{result.reading['model']}  ({result.reading['run_id']})"
        console().print(rendered(contrast_section(label, result)))
        return
    write_table(result.predictions if request.predictions else result.layers, format, console())
    for line in result.findings:
        say(line)


def report(request: ReportRequest) -> None:
    """Write the page of a warehouse."""
    from avss_dist.report.page.page import save_report

    opened = open_warehouse(str(request.warehouse))
    run_ids = set(choose_run_ids(opened, request.run, failed=True)) if request.run else None
    save_report(opened, Path(request.output), run_ids, request.by)
    emit(request.output)


def publish(request: PublishRequest) -> None:
    """Write the finished runs of a warehouse for others."""
    from avss_dist.report.publish import publish as publish_to

    rows = publish_to(open_warehouse(str(request.warehouse)), Path(request.folder))
    emit(f"{request.folder}: {', '.join(f'{describe_count(number)} {name}' for name, number in rows.items())}.")


def compact(request: CompactRequest) -> None:
    """Copy many finished runs into few large files."""
    opened = open_warehouse(str(request.warehouse))
    copied = opened.compact()
    tables = ", ".join(f"{name} of {count_of(number, 'run')}" for name, number in copied.items() if number)
    every = "every finished run that can be read" if opened.damaged else "every finished run"
    emit(f"{opened.root}: {f'copied {tables}' if tables else f'{every} was compacted before'}.")
