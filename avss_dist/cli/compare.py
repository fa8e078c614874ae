"""`avss compare`, `findings`, `scores`, `quantiles` and `export`: what the runs of a warehouse say, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from avss_dist.cli.choose import choose_runs, choose_scores, choose_threshold, open_warehouse
from avss_dist.cli.options import (
    FORMATS,
    EveryRunOption,
    FormatOption,
    RecipeOption,
    RunsOption,
    SiteOption,
    ThresholdOption,
    WarehousePath,
    choice,
)
from avss_dist.errors import ConfigError, QueryError
from avss_dist.settings import LOWEST_SHARE, PUBLISHED_THRESHOLD, RECIPES, SCORES, SITES
from avss_dist.system.streams import console, emit
from avss_dist.text import describe_threshold

KINDS = ("csv", "json", "latex", "markdown")
COMPARED = ("run", "family", "revision", "corpus", "dtype", "recipe", "threshold", "site", "score")
PUBLISHED = f"{PUBLISHED_THRESHOLD:g}"


def compare(
    warehouse: WarehousePath,
    run: EveryRunOption = None,
    by: Annotated[str, choice(COMPARED, "What the two of a pair differ in.")] = "run",
    site: SiteOption = SITES[0],
    recipe: RecipeOption = RECIPES[0],
    threshold: ThresholdOption = PUBLISHED,
    score: Annotated[
        str,
        choice(SCORES, "What layers are ranked by."),
    ] = "avss",
    k: Annotated[int | None, typer.Option("--k", help="How many of the lowest layers to compare.", min=1)] = None,
    share: Annotated[float, typer.Option(help="The same as a share of the layers.", min=0, max=1)] = LOWEST_SHARE,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare runs of different corpora, dtypes and so on, too.")
    ] = False,
    format: FormatOption = FORMATS[0],
) -> None:
    """Say how far the rankings of layers agree, and what to know before believing them."""
    from avss_dist.analysis.compare import compare as compare_runs
    from avss_dist.analysis.findings import findings as find
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.compare import findings_table, pairs_table

    opened = open_warehouse(warehouse)
    names = [row["run_id"] for row in choose_runs(opened, run or [], every=True)]
    at = choose_threshold(threshold)
    pairs = compare_runs(
        opened,
        names,
        by=by,
        site=site,
        recipe=recipe,
        threshold=at,
        score=score,
        k=k,
        share=share,
        allow_mismatch=allow_mismatch,
    )
    if format != FORMATS[0]:
        return write_table(pairs, format, console())
    fixed = {
        "score": score,
        "site": site,
        "recipe": recipe,
        "threshold": f"|x| < {describe_threshold(at.value, at.kind)}",
    }
    title = f"by {by}  " + " / ".join(text for name, text in fixed.items() if name != by)
    console().print(pairs_table(pairs, title))
    compared = {name for side in ("a_run_id", "b_run_id") for name in pairs[side].unique().to_pylist()}
    found = find(opened, [name for name in names if name in compared], threshold=at)
    shown = _at(found, None if by == "site" else site, None if by == "recipe" else recipe)
    console().print(findings_table(shown))
    return None


def findings(
    warehouse: WarehousePath,
    run: EveryRunOption = None,
    site: SiteOption = SITES[0],
    recipe: RecipeOption = RECIPES[0],
    threshold: ThresholdOption = PUBLISHED,
    every: Annotated[bool, typer.Option("--all", help="Of every site and recipe.")] = False,
    format: FormatOption = FORMATS[0],
) -> None:
    """Say what a careful reader would warn of: scores that track depth, noise, rounding, single units, and so on."""
    from avss_dist.analysis.findings import findings as find
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.compare import findings_table

    opened = open_warehouse(warehouse)
    names = [row["run_id"] for row in choose_runs(opened, run or [], every=True)]
    found = find(opened, names if run else None, threshold=choose_threshold(threshold))
    shown = found if every else _at(found, site, recipe)
    if format != FORMATS[0]:
        return write_table(shown, format, console())
    console().print(findings_table(shown))
    if len(shown) < len(found):
        emit(f"{len(found) - len(shown)} more at other sites and recipes: --all.")
    return None


def scores(
    warehouse: WarehousePath,
    threshold: ThresholdOption = PUBLISHED,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    run: RunsOption = None,
    format: FormatOption = FORMATS[0],
) -> None:
    """Score runs at any threshold, absolute or relative, from what they stored: no model runs again."""
    import pyarrow.compute as pc

    from avss_dist.analysis.stats_findings import grouped
    from avss_dist.analysis.thresholds import scores_at
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.scores import layer_table

    opened = open_warehouse(warehouse)
    runs = choose_runs(opened, run or [])
    at = choose_threshold(threshold)
    table = scores_at(opened, runs, at, sites=[site])
    recipes = sorted(set(table["recipe"].to_pylist()))
    table = table.filter(pc.field("recipe") == recipe)
    if not table.num_rows:
        raise QueryError(f"No statistics for site '{site}' and recipe '{recipe}'.", f"Recipes: {', '.join(recipes)}.")
    if format != FORMATS[0]:
        return write_table(table, format, console())
    by_run = grouped(table.to_pylist(), "run_id")
    for row in runs:
        found = by_run.get((row["run_id"],), [])
        console().print(layer_table(row, found))
        emit(f"From stored counts: {_exactness(found, at.value if at.kind == 'absolute' else None)}")
    return None


def quantiles(
    warehouse: WarehousePath,
    q: Annotated[list[float] | None, typer.Option("--q", help="Quantile of |x|, 0 to 1; repeatable.")] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="The threshold below which this share of the elements is; repeatable."),
    ] = None,
    site: SiteOption = SITES[0],
    run: RunsOption = None,
    format: FormatOption = FORMATS[0],
) -> None:
    """Say how large activations are, by layer: quantiles of |x|, or the threshold for a wanted sparsity."""
    shares = [*(q or []), *(sparsity or [])] or [0.5, 0.9, 0.99]
    for share in shares:
        if not 0 <= share <= 1:
            raise ConfigError(f"{share:g} is not a share.", "Write a number from 0 to 1.")
    from avss_dist.analysis.stats_findings import grouped
    from avss_dist.analysis.thresholds import quantiles as find
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.compare import quantiles_table

    opened = open_warehouse(warehouse)
    runs = choose_runs(opened, run or [])
    table = find(opened, runs, shares, [site])
    if not table.num_rows:
        raise QueryError(f"No statistics of site '{site}'.", "avss query WAREHOUSE 'SELECT run_id, sites FROM runs'")
    if format != FORMATS[0]:
        return write_table(table, format, console())
    for found in grouped(table.to_pylist(), "run_id").values():
        console().print(quantiles_table(found))
    return None


def export(
    warehouse: WarehousePath,
    to: Annotated[str, choice(KINDS, "What to write.", "--to")],
    run: RunsOption = None,
    site: SiteOption = SITES[0],
    recipe: RecipeOption = RECIPES[0],
    threshold: ThresholdOption = PUBLISHED,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="FILE; else standard output.")] = None,
) -> None:
    """Write scores by layer as a table for a paper."""
    from avss_dist.report.export import export_text
    from avss_dist.report.output import write_file

    opened = open_warehouse(warehouse)
    runs = choose_runs(opened, run or [])
    text = export_text(runs, choose_scores(opened, runs, site, recipe, threshold), to)
    if output is None:
        emit(text, end="")
        return
    write_file(output, text.encode())
    emit(output)


def _exactness(scores: Sequence[Mapping[str, Any]], threshold: float | None) -> str:
    """How far near-zero counts are known, and where they would be exact."""
    from avss_dist.analysis.thresholds import INTERPOLATED
    from avss_dist.stats.histogram import bin_edges

    cut = [s for s in scores if s["exactness"] == INTERPOLATED]
    if not cut:
        return "every count is exact."
    off = max(max(s["near_zero_high"] - k, k - s["near_zero_low"]) / k for s in cut if (k := s["near_zero_count"]))
    where = "" if threshold is None else " Exact: {:.10g} and {:.10g}.".format(*bin_edges(threshold))
    said = f"{len(cut)} of {len(scores)} counts are interpolated"
    return f"{said}, and off by {off:.0%} at the very most.{where}"


def _at(found: Any, site: str | None, recipe: str | None) -> Any:
    """Findings of a site and a recipe, and those that hold whatever they are; None is any."""
    import pyarrow.compute as pc

    for name, value in (("site", site), ("recipe", recipe)):
        if value is not None:
            found = found.filter((pc.field(name) == value) | pc.field(name).is_null())
    return found
