"""Python functions of the commands that read a warehouse: the fields of their requests are keywords.

Each function imports what it needs, so that a list of runs need not wait for the imports of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.chosen import choose_runs, choose_stored
from avss_dist.core.endings import require_picture
from avss_dist.core.errors import QueryError, WarehouseError
from avss_dist.core.files import write_output
from avss_dist.core.results import Table
from avss_dist.core.suggestions import command_line
from avss_dist.core.thresholds import parse_threshold
from avss_dist.core.validation import keywords
from avss_dist.core.values import NewRow
from avss_dist.read_requests import (
    CompactRequest,
    CompareRequest,
    ContrastRequest,
    FindingsRequest,
    ListRequest,
    PublishRequest,
    QueryRequest,
    RemoveRequest,
    ReportRequest,
    ShowRequest,
)
from avss_dist.stats.catalog import READING
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.names import REPAIR, ROW_START
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import UNFINISHED

if TYPE_CHECKING:
    from avss_dist.analysis.comparison import RankingComparison
    from avss_dist.analysis.contrast import Contrast
    from avss_dist.analysis.curves import RankingCurves
    from avss_dist.warehouse.removal import Removal

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

LISTED = {
    "plans": """SELECT model, removals(drop, drop_parts) AS drop, count(DISTINCT task) AS tasks,
            max(created_at) AS evaluated_at
        FROM evaluations WHERE len(drop) + len(drop_parts) > 0 AND layer IS NULL GROUP BY ALL
        ORDER BY evaluated_at DESC, model, drop""",
    "evaluations": f"""WITH results AS (FROM evaluations WHERE NOT starts_with(task, '{ROW_START}')
            AND NOT starts_with(task, '{REPAIR}'))
        SELECT model, removals(drop, drop_parts) AS drop, rounding, task, metric, NULL AS layers, value, stderr,
            created_at
        FROM results WHERE layer IS NULL
        UNION ALL
        SELECT model, [], split_part(rounding, '@', 1), task, regexp_replace(metric, '(:.*|_[0-9]+)$', ''),
            count(DISTINCT layer), NULL, NULL, max(created_at)
        FROM results WHERE layer IS NOT NULL GROUP BY run_id, 1, 2, 3, 4, 5
        ORDER BY created_at DESC, task, metric, drop, rounding, model, layers, value, stderr""",
}
"""SQL query of the lists other than that of runs, newest first. Rows are in one order, whatever DuckDB's threads do.

Measurements of single layers are a row for each task and metric. The machine's own tasks are left out.
"""
RUNS = ("run_id", "model", "status", "corpus", "num_tokens", "dtype", "created_at", "kept_shards", "num_shards", "seed")
"""Columns of the list of runs."""


def reading(cls: Callable[P, R]) -> Callable[[Callable[[Warehouse, R], T]], Callable[P, T]]:
    """Decorate a function of a warehouse and a request to take the request's fields as keywords, as `keywords`."""

    def decorate(function: Callable[[Warehouse, R], T]) -> Callable[P, T]:
        @wraps(function)
        def open_and_read(request: Any) -> T:
            return function(Warehouse(request.warehouse), request)

        return keywords(cls)(open_and_read)

    return decorate


@reading(ListRequest)
def ls(opened: Warehouse, request: ListRequest) -> Table:
    """Return the runs, the evaluated sets of layers, or the evaluations of a warehouse, newest first.

    Unfinished runs have the number of their stored shards.
    """
    if request.what == "runs":
        return Table(_listed_runs(opened))
    return Table(opened.sql(LISTED[request.what]))


def _listed_runs(opened: Warehouse) -> pa.Table:
    """Return the unfinished runs, then the others, newest first."""
    unfinished = opened.unfinished()
    statuses = pa.array([UNFINISHED] * len(unfinished), pa.string())
    started = pc.cast(unfinished["started_at"], pa.timestamp("us", "UTC"))
    unfinished = unfinished.append_column("status", statuses).append_column("created_at", started)
    unfinished = unfinished.append_column("seed", pa.nulls(len(unfinished), pa.int64())).select(RUNS)
    try:
        ended = opened.table("runs", columns=[name for name in RUNS if name != "kept_shards"])
    except WarehouseError:
        if not unfinished.num_rows:
            raise
        return unfinished
    stored_shards = pc.if_else(pc.equal(ended["status"], "done"), ended["num_shards"], None)
    ended = ended.append_column("kept_shards", stored_shards).select(RUNS)
    ended = ended.sort_by([("created_at", "descending"), ("run_id", "ascending")])
    return pa.concat_tables([unfinished.cast(ended.schema), ended])


@reading(ShowRequest)
def show(opened: Warehouse, request: ShowRequest) -> Table:
    """Return the scores of runs by layer, by default of the newest, with a column for each score of your own.

    With ``experts``, rows of ``expert_stats``; with ``quantiles`` or ``sparsity``, quantiles of abs(x). A picture of
    the scores is saved to ``output``.
    """
    from avss_dist.analysis.experts import require_experts
    from avss_dist.analysis.own_scores import own_labels, own_score
    from avss_dist.analysis.thresholds import layer_scores, quantiles

    if request.output is not None:
        require_picture(request.output)
        if request.experts or request.shares:
            raise QueryError(
                "`output` is a picture of scores, not of routed experts or quantiles.", "Leave `output` out."
            )
    run_rows = choose_runs(opened, request.run)
    run_ids = [row["run_id"] for row in run_rows]
    if request.experts:
        for run_id in run_ids:
            require_experts(opened, run_id)
        return Table(opened.table("expert_stats", run_ids=run_ids))
    if request.shares:
        table = quantiles(opened, run_rows, request.shares, [request.site])
        if not table.num_rows:
            listing = command_line("query", "SELECT run_id, sites FROM runs", "-w", opened.root)
            raise QueryError(f"No statistics of site '{request.site}'.", f"List sites: {listing}")
        return Table(table)

    threshold = Threshold(*parse_threshold(request.threshold))
    scores = layer_scores(opened, run_rows, threshold, site=request.site, recipe=request.recipe)
    if not scores.num_rows:
        raise _not_scored(opened.table("scores", run_ids=run_ids, columns=READING), request)
    labels = own_labels(request.by)
    for name, label in labels.items():
        values = {row["run_id"]: own_score(name, opened, row).values for row in run_rows}
        column = []
        for run_id, layer in zip(scores["run_id"].to_pylist(), scores["layer"].to_pylist(), strict=True):
            column.append(values[run_id].get(layer))
        scores = scores.append_column(label, pa.array(column, pa.float64()))
    if request.output is not None:
        from avss_dist.reports.chart import layers_chart, save_chart  # altair takes a second to import

        chart = layers_chart(run_rows, score_rows(scores), [*labels.values()])
        save_chart(chart, Path(request.output), "Layer scores by depth")
    return Table(scores)


def score_rows(scores: pa.Table) -> list[NewRow]:
    """Return rows of scores, with None for NaN."""
    rows = scores.to_pylist()
    for row in rows:
        for name, value in row.items():
            if value != value:  # NaN alone is not equal to itself
                row[name] = None
    return rows


def _not_scored(table: pa.Table, request: ShowRequest) -> QueryError:
    """Return the error for missing scores of a reading. It lists the readings of a table."""
    rows = table.group_by(table.column_names, use_threads=False).aggregate([]).to_pylist()
    thresholds = set()
    for row in rows:
        if row["site"] == request.site and row["recipe"] == request.recipe:
            thresholds.add((row["threshold_kind"], row["threshold"]))
    if not thresholds:
        scored = sorted({f"{row['site']} {row['recipe']}" for row in rows})
        return QueryError(
            f"No scores of site '{request.site}' with recipe '{request.recipe}'.", f"Scored: {', '.join(scored)}."
        )
    names = []
    for kind, value in sorted(thresholds):
        unit = "rms" if kind == "rms" else ""
        names.append(f"{value:g}{unit}")
    return QueryError(
        f"No scores at threshold {request.threshold}, and no statistics to compute them.",
        f"Scored: {', '.join(names)}.",
    )


@reading(QueryRequest)
def query(opened: Warehouse, request: QueryRequest) -> Table:
    """Return the rows of a query in SQL (DuckDB) or, with ``schema``, every table and column of a warehouse."""
    if request.schema:
        from avss_dist.reports.terminal.schema import schema_table

        return Table(schema_table())
    if not request.sql:
        raise QueryError("avss query needs a query.", "avss query 'FROM runs'; avss query --schema lists the tables.")
    return Table(opened.sql(request.sql))


@reading(CompareRequest)
def compare(
    opened: Warehouse, request: CompareRequest, *, max_listed: int | None = None
) -> RankingComparison | RankingCurves:
    """Compare the layer rankings of runs, by default of all finished ones, by pairs or ``along`` an axis.

    Curves of trainings have `changes`, the layers that changed beyond the choice of text, or the reason why nothing is
    claimed, ``no_claim``. ``seeds`` joins trainings that differ in the seed alone. A picture is saved to ``output``.
    All pairs are listed if there are at most ``max_listed``, by default `comparison.MAX_PAIRS`.
    """
    from avss_dist.analysis import comparison as comparing
    from avss_dist.analysis.curves import AXIS_TITLES, curves_chart, ranking_curves

    if request.output is not None:
        require_picture(request.output)
    run_ids = chosen_ids(opened, request.run)
    selection: dict[str, Any] = {
        "score": request.score,
        "site": request.site,
        "recipe": request.recipe,
        "threshold": Threshold(*parse_threshold(request.threshold)),
        "allow_mismatch": request.allow_mismatch,
    }
    if request.along:
        curves = ranking_curves(opened, run_ids, along=request.along, **selection)
        if request.output is not None:
            from avss_dist.reports.chart import save_chart  # altair takes a second to import

            save_chart(curves_chart(curves), Path(request.output), f"Ranks along {AXIS_TITLES[request.along]}")
        return curves
    comparison = comparing.compare(
        opened,
        run_ids,
        by=request.by,
        share=request.share,
        mapped=request.output is not None,
        max_listed=max_listed or comparing.MAX_PAIRS,
        **selection,
    )
    if request.output is not None:
        from avss_dist.reports.chart import save_chart, similarity_chart  # altair takes a second to import

        save_chart(similarity_chart(comparison), Path(request.output), "Agreement of layer rankings")
    return comparison


@reading(FindingsRequest)
def findings(opened: Warehouse, request: FindingsRequest) -> Table:
    """List findings that speak against the scores of runs, by default of all finished ones.

    With ``truth``, a row for each score that says how far it agrees with the measured ground truth.
    """
    from avss_dist.analysis.findings import findings as find
    from avss_dist.analysis.scorecard import best_readings, score_cards

    if request.truth:
        cards = score_cards(opened, choose_runs(opened, request.run, every=True), request.by)
        if not request.every:
            cards = best_readings(cards)
        return Table(cards)
    run_ids = chosen_ids(opened, request.run)
    rows = find(
        opened,
        run_ids if request.run else None,  # all, with those that cannot be read
        threshold=Threshold(*parse_threshold(request.threshold)),
        site=None if request.every else request.site,
        recipe=None if request.every else request.recipe,
    )
    return Table(rows)


@reading(ContrastRequest)
def contrast(opened: Warehouse, request: ContrastRequest) -> Contrast:
    """Return the contrast of a run on paired text: of each layer, by label of the answers, with controls."""
    from avss_dist.analysis.contrast import contrast as contrast_run
    from avss_dist.analysis.contrast import paired_run

    value, kind = parse_threshold(request.threshold)
    return contrast_run(
        opened,
        paired_run(opened, request.run).row,
        site=request.site,
        recipe=request.recipe,
        threshold=value,
        threshold_kind=kind,
        hallucinated=request.hallucinated,
        truthful=request.truthful,
    )


@reading(ReportRequest)
def report(opened: Warehouse, request: ReportRequest) -> Path:
    """Write the page of a warehouse, and return its path."""
    from avss_dist.reports.page.page import report_page

    run_ids = None
    if request.run:
        run_ids = {row["run_id"] for row in choose_runs(opened, request.run, failed=True, columns=("run_id",))}
    write_output(request.output, report_page(opened, run_ids, request.by))
    return Path(request.output)


@reading(PublishRequest)
def publish(opened: Warehouse, request: PublishRequest) -> Table:
    """Write the finished runs of a warehouse for others, and return the number of rows of each table."""
    from avss_dist.reports.publish import publish as write_tables

    return _counts("rows", write_tables(opened, Path(request.folder)))


@reading(CompactRequest)
def compact(opened: Warehouse, request: CompactRequest) -> Table:
    """Copy many finished runs into few large files, and return the number of runs copied of each table."""
    return _counts("runs", opened.compact())


@reading(RemoveRequest)
def rm(opened: Warehouse, request: RemoveRequest) -> Table:
    """Remove runs and the evaluations that go with them, and return the number of files, rows and bytes of each table.

    An evaluation is of a checkpoint: it goes with the last finished run of it.
    """
    removal = plan_removal(opened, request)
    removed = removal.table()
    if not request.dry_run:
        removal.apply()
    return Table(removed)


def plan_removal(opened: Warehouse, request: RemoveRequest) -> Removal:
    """Return what a request removes.

    Raises:
        NoRuns: the warehouse is empty.
        QueryError: no run has a name, or a part of an id is not unique.
        ConfigError: a run is being measured.
    """
    from avss_dist.warehouse.removal import Catalog, Removal

    catalog = Catalog(opened)
    if catalog.is_empty:
        opened.runs()  # says why there are none
    run_ids = choose_stored(request.run, catalog)
    return Removal.plan(catalog, run_ids, unused=request.unused, keep_evaluations=request.keep_evaluations)


def _counts(heading: str, numbers: Mapping[str, int]) -> Table:
    return Table(pa.table({"table": [*numbers], heading: [*numbers.values()]}))


def doctor() -> Table:
    """Return a row for each check of this machine: whether it works, and a detail."""
    from avss_dist.core.doctor import check_machine

    return Table(pa.Table.from_pylist([asdict(result) for result in check_machine()]))


def chosen_ids(opened: Warehouse, names: Sequence[str]) -> list[str]:
    """Return the ids of the runs with these names, or of all finished ones without names."""
    return [row["run_id"] for row in choose_runs(opened, names, every=True, columns=("run_id",))]
