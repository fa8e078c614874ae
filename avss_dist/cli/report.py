"""`avss report`: a warehouse as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avss_dist.cli.choose import choose_runs, open_warehouse
from avss_dist.cli.options import EveryRunOption, WarehouseOption
from avss_dist.core.settings import DEFAULT_WAREHOUSE
from avss_dist.system.streams import emit


def report(
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    run: EveryRunOption = None,
) -> None:
    """Write a self-contained web page: findings, score card, charts across runs and by depth, tables."""
    from avss_dist.report.page.page import save_report

    opened = open_warehouse(warehouse)
    run_ids = {row["run_id"] for row in choose_runs(opened, run, failed=True)} if run else None
    save_report(opened, output, run_ids)
    emit(output)
