"""`avss show`, `avss plot` and `avss query`: reading a warehouse."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from avss_dist.cli.base import interruptible
from avss_dist.cli.choose import choose_run, choose_runs, choose_scores, open_warehouse
from avss_dist.cli.options import (
    FORMATS,
    WAREHOUSE,
    RecipeOption,
    RunOption,
    RunsOption,
    SiteOption,
    ThresholdOption,
    WarehousePath,
    format_option,
)
from avss_dist.errors import QueryError
from avss_dist.settings import PUBLISHED_THRESHOLD, RECIPES, SITES
from avss_dist.system.streams import console, emit

QUERY_FORMATS = (*FORMATS, "parquet", "markdown")


def show(
    warehouse: WarehousePath,
    run: RunOption = None,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = f"{PUBLISHED_THRESHOLD:g}",
) -> None:
    """Show a run's layers as a table with bars; the lowest 25% are marked."""
    from avss_dist.report.terminal.scores import layer_table

    opened = open_warehouse(warehouse)
    chosen = choose_run(opened, run)
    console().print(layer_table(chosen, choose_scores(opened, [chosen], site, recipe, threshold)))
    others = opened.runs().num_rows - 1
    if others and not run:
        emit(f"{others} more in {opened.root}: avss query {opened.root} 'SELECT run_id, model, status FROM runs'")


def plot(
    warehouse: WarehousePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.png, .svg or .html.")],
    run: RunsOption = None,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = f"{PUBLISHED_THRESHOLD:g}",
) -> None:
    """Draw scores by depth, the rivals beside them."""
    from avss_dist.report.chart import MOST_RUNS, layers_chart, save_chart

    opened = open_warehouse(warehouse)
    runs = choose_runs(opened, run or [])
    if len(runs) > MOST_RUNS:
        raise QueryError(
            f"{len(runs):,} runs are too many for one chart; it holds {MOST_RUNS} at most.",
            "Name fewer with `run`; avss report draws the runs of a whole warehouse.",
        )
    save_chart(layers_chart(runs, choose_scores(opened, runs, site, recipe, threshold)), output)
    emit(output)


def query(
    warehouse: Annotated[str | None, typer.Argument(help=WAREHOUSE)] = None,
    sql: Annotated[
        str | None,
        typer.Argument(help="One SELECT over the tables (--schema lists them), or @name, a ready query."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Say what every table, column and ready query means.")
    ] = False,
    format: Annotated[str, format_option(*QUERY_FORMATS)] = FORMATS[0],
) -> None:
    """Query a warehouse with SQL (DuckDB). It only reads, and only the warehouse."""
    from avss_dist.report.output import write_table

    if format == "parquet" and sys.stdout.isatty():
        raise QueryError(
            "Parquet is not for a terminal.", "Redirect it: avss query ... --format parquet > result.parquet"
        )
    if schema:
        return _print_schema(format)
    if not warehouse or not sql:
        missing = "a query" if warehouse else "a warehouse and a query"
        raise QueryError(f"avss query needs {missing}.", "avss query WAREHOUSE 'FROM runs'; avss query --schema.")
    opened = open_warehouse(warehouse)
    with console().status("Reading ...") if sys.stdout.isatty() else nullcontext():  # thousands of runs, the first time
        table = interruptible(lambda: opened.sql(sql))
    write_table(table, format, console())
    return None


def _print_schema(format: str) -> None:
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.schema import schema_markdown, schema_page, schema_table

    if format == "table":
        console().print(schema_page())
    elif format == "markdown":
        emit(schema_markdown())
    else:
        write_table(schema_table(), format, console())
