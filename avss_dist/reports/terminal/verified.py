"""The table of a comparison of a checkpoint with an inference server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avss_dist.analysis.section import ReportColumn, ReportRow, ReportTable

if TYPE_CHECKING:
    from avss_dist.serving.verify import Verified

LOSS = "{:z.4f}".format
_COLUMNS = (
    ReportColumn("model", "model", number=False),
    ReportColumn("tokens before", "tokens_before", number=False),
    ReportColumn("positions", "positions", "{:,}".format),
    ReportColumn("equal", "equal", "{:z.1%}".format),
    ReportColumn("ties", "ties", "{:,}".format),
    ReportColumn("differ", "differences", "{:,}".format),
    ReportColumn("loss", "loss", LOSS, priority=1),
    ReportColumn("server's loss", "server_loss", LOSS, priority=1),
    ReportColumn("largest", "largest", "{:z.2g}".format, priority=2),
)


def verified_table(done: Verified) -> ReportTable:
    """Return a table with a row for each group of positions."""
    return ReportTable(
        columns=_COLUMNS,
        rows=[ReportRow(row) for row in done.rows()],
        title=f"transformers and {done.runtime}",
        caption="Equal: share of next tokens. Ties: other tokens, within the rounding of transformers itself. Differ: "
        "by more than that, in the margin of the token or in the loss. Largest: difference of a position, in nats.",
    )
