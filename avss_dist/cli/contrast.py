"""`avss contrast`: which layers tell hallucinated from truthful answers, and what is left of it under controls."""

from __future__ import annotations

from typing import Annotated

import typer

from avss_dist.cli.choose import choose_run, open_warehouse
from avss_dist.cli.options import (
    FORMATS,
    PUBLISHED,
    FormatOption,
    RunOption,
    SiteOption,
    WarehouseOption,
    choice,
)
from avss_dist.settings import DEFAULT_WAREHOUSE, RECIPES
from avss_dist.system.streams import console, say
from avss_dist.text import parse_threshold


def contrast(
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
    run: RunOption = None,
    site: SiteOption = "block",
    recipe: Annotated[str, choice(RECIPES, "Definition of AVSS.")] = "pooled",
    threshold: Annotated[
        str, typer.Option(help="Near zero means below this: one that the run counted, or 0.1rms.")
    ] = PUBLISHED,
    hallucinated: Annotated[str | None, typer.Option(help="Label of hallucinated answers.")] = None,
    truthful: Annotated[str | None, typer.Option(help="Label of truthful answers.")] = None,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="With csv or json: how well each layer predicts the label.")
    ] = False,
    format: FormatOption = FORMATS[0],
) -> None:
    """Contrast hallucinated with truthful answers, layer by layer, with controls; for a run on paired text."""
    value, kind = parse_threshold(threshold)

    from avss_dist.analysis.contrast import contrast as contrast_run
    from avss_dist.report.contrasts import contrast_section
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.tables import rendered

    opened = open_warehouse(warehouse)
    row = choose_run(opened, run)
    found = contrast_run(
        opened,
        row,
        site=site,
        recipe=recipe,
        threshold=value,
        threshold_kind=kind,
        hallucinated=hallucinated,
        truthful=truthful,
    )
    if format == "table":
        label = f"{row['model']}  ({row['run_id']})"
        console().print(rendered(contrast_section(label, found)))
        return
    write_table(found.predictions if predictions else found.layers, format, console())
    for line in found.findings:
        say(line)
