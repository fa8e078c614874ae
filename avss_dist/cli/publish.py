"""`avss publish`: a copy of a warehouse for others."""

from __future__ import annotations

from typing import Annotated

import typer

from avss_dist.cli.choose import open_warehouse
from avss_dist.cli.options import WarehouseOption
from avss_dist.core.settings import DEFAULT_WAREHOUSE
from avss_dist.core.text import RedactedURI, describe_count
from avss_dist.system.streams import emit


def publish(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="A new folder or s3://, gs://, abfss:// URI, or hf://datasets/ORG/NAME."),
    ],
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
) -> None:
    """Write the finished runs as a few Parquet files, with a DuckDB catalog and a dataset card, for others to read."""
    from avss_dist.warehouse.publish import publish as publish_to

    rows = publish_to(open_warehouse(warehouse), target)
    emit(f"{RedactedURI(target)}: {', '.join(f'{describe_count(number)} {name}' for name, number in rows.items())}.")
