"""`avss publish`: a copy of a warehouse for others."""

from __future__ import annotations

from typing import Any

from avss_dist.cli.choose import open_warehouse
from avss_dist.cli.options import takes
from avss_dist.core.text import RedactedURI, describe_count
from avss_dist.requests import PublishRequest
from avss_dist.system.streams import emit


@takes(PublishRequest)
def publish(**values: Any) -> None:
    """Write the finished runs as a few Parquet files, with a DuckDB catalog and a dataset card, for others to read."""
    from avss_dist.warehouse.publish import publish as publish_to

    request = PublishRequest(**values)
    rows = publish_to(open_warehouse(str(request.warehouse)), request.target)
    tables = ", ".join(f"{describe_count(number)} {name}" for name, number in rows.items())
    emit(f"{RedactedURI(request.target)}: {tables}.")
