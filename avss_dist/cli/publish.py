"""`avss publish`: a copy of a warehouse for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avss_dist.cli.choose import open_warehouse
from avss_dist.cli.options import takes
from avss_dist.core.text import RedactedURI, describe_count
from avss_dist.read_requests import PublishRequest
from avss_dist.system.streams import emit


@takes(PublishRequest)
def publish(**values: Any) -> None:
    """Write the finished runs as a site: a page, a few Parquet files, a DuckDB catalog and a dataset card."""
    from avss_dist.report.page.page import save_report
    from avss_dist.warehouse.publish import PAGE, SCORES
    from avss_dist.warehouse.publish import publish as publish_to

    request = PublishRequest(**values)
    opened = open_warehouse(str(request.warehouse))

    def write_page(folder: Path) -> None:
        save_report(opened, folder / PAGE, scores=folder / SCORES)

    rows = publish_to(opened, request.target, write_page=write_page, space=request.space)
    tables = ", ".join(f"{describe_count(number)} {name}" for name, number in rows.items())
    emit(f"{RedactedURI(request.target)}: {tables}.")
