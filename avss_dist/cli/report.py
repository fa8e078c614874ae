"""`avss report`: a warehouse as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avss_dist.cli.choose import choose_run_ids, open_warehouse
from avss_dist.cli.options import takes
from avss_dist.read_requests import ReportRequest
from avss_dist.system.streams import emit


@takes(ReportRequest)
def report(**values: Any) -> None:
    """Write a self-contained web page: findings, score card, charts across runs and by depth, tables."""
    from avss_dist.report.page.page import save_report

    request = ReportRequest(**values)
    opened = open_warehouse(str(request.warehouse))
    run_ids = set(choose_run_ids(opened, request.run, failed=True)) if request.run else None
    save_report(opened, Path(request.output), run_ids, request.by)
    emit(request.output)
