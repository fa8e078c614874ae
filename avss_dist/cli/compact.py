"""`avss compact`: few large files in place of many small ones."""

from __future__ import annotations

from typing import Any

from avss_dist.cli.choose import open_warehouse
from avss_dist.cli.options import takes
from avss_dist.core.text import count_of
from avss_dist.read_requests import CompactRequest
from avss_dist.system.streams import emit


@takes(CompactRequest)
def compact(**values: Any) -> None:
    """Copy many finished runs into few large files, so that every reader opens them in a moment."""
    opened = open_warehouse(str(CompactRequest(**values).warehouse))
    copied = opened.compact()
    tables = ", ".join(f"{name} of {count_of(number, 'run')}" for name, number in copied.items() if number)
    every = "every finished run that can be read" if opened.damaged else "every finished run"
    emit(f"{opened.root}: {f'copied {tables}' if tables else f'{every} was compacted before'}.")
