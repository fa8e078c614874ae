"""`avss publish`: a copy of a warehouse for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avss_dist.cli.choose import open_warehouse
from avss_dist.cli.options import takes
from avss_dist.core.text import describe_count
from avss_dist.read_requests import PublishRequest
from avss_dist.system.streams import emit


@takes(PublishRequest)
def publish(**values: Any) -> None:
    """Write the finished runs for others: the page, a Parquet file for each table, and a dataset card."""
    from avss_dist.report.publish import publish as publish_to

    request = PublishRequest(**values)
    rows = publish_to(open_warehouse(str(request.warehouse)), Path(request.folder))
    emit(f"{request.folder}: {', '.join(f'{describe_count(number)} {name}' for name, number in rows.items())}.")
