"""`avss compact`: few large files in place of many small ones."""

from __future__ import annotations

from typing import Any

from avss_dist.cli.options import takes
from avss_dist.core.text import count_of
from avss_dist.read_requests import CompactRequest
from avss_dist.system.streams import emit


@takes(CompactRequest)
def compact(**values: Any) -> None:
    """Copy many finished runs into few large files, so that every reader opens them in a moment."""
    from avss_dist.warehouse.reader import Warehouse

    warehouse = Warehouse(str(CompactRequest(**values).warehouse))
    copied = warehouse.compact()
    tables = ", ".join(f"{name} of {count_of(number, 'run')}" for name, number in copied.items() if number)
    emit(f"{warehouse.root}: {f'copied {tables}' if tables else 'every finished run was compacted before'}.")
