"""`avss report`: a warehouse as a page."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from avss_dist.cli.options import EveryRunOption, WarehousePath
from avss_dist.errors import QueryError, require_known


def report(
    warehouse: WarehousePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.html.")] = Path("report.html"),
    run: EveryRunOption = None,
) -> None:
    """Write a page that needs no network: findings, runs, charts with controls, a table of scores."""
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(warehouse)
    known = sorted(opened.table("runs", columns=["run_id"])["run_id"].to_pylist())
    run_ids = _matching(run, known) if run else None

    from avss_dist.report.page.page import save_report

    save_report(opened, output, run_ids)
    print(output)


def _matching(patterns: list[str], known: list[str]) -> set[str]:
    """The run ids, of failed runs too, that a pattern names; each pattern must name one."""
    matches = {pattern: [run_id for run_id in known if fnmatchcase(run_id, pattern)] for pattern in patterns}
    for pattern in (pattern for pattern, found in matches.items() if not found):
        require_known("run", pattern, known, QueryError)
    return {run_id for found in matches.values() for run_id in found}
