"""Receipts of comparisons: a file beside the weights, and a line of the model card. Neither changes the revision."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import explain_damaged_record
from avss_dist.core.files import write_file
from avss_dist.core.text import escape_markdown
from avss_dist.core.validation import Count, RedactedText, checked
from avss_dist.models.checkpoint.locate import VERIFIED

Number = Annotated[float, Field(strict=False)]
_END = "Written by avss_dist."
"""Last line of the model cards of pruned checkpoints."""


@checked
class Receipt:
    """A comparison of a checkpoint with a server."""

    runtime: str
    """Name of the program."""
    version: str
    """Version of the program."""
    date: str
    """Day of the comparison (UTC), 2026-12-01."""
    outcome: str
    """Result: same or different."""
    revision: str
    """Revision of the checkpoint."""
    corpus: RedactedText
    """Text of the rows, without keys."""
    rows: str
    """Hash of the tokens of the rows."""
    dtype: str
    """Dtype whose rounding gave the tolerance."""
    tolerance: Number
    """Difference that rounding explains, in nats."""
    positions: Count
    """Number of predicted tokens that were compared."""
    equal: Number
    """Share of equal next tokens."""
    different: Number
    """Share of positions that differ by more than rounding."""
    largest: Number
    """Largest difference of a position, in nats."""
    loss: Number | None = None
    """Mean loss by transformers, if the server tells its own."""
    server_loss: Number | None = None
    """Mean loss by the server."""
    first: Count | None = None
    """Token of a row, from 1, from which the server reads the checkpoint differently."""
    whole_different: Number | None = None
    """Share of positions in which the whole model differs on its server, if it was compared."""
    transformers: str
    """Version of transformers."""

    def describe(self) -> str:
        """Return a line for people."""
        reads = "predicts the same"
        if self.first is not None:
            reads = f"reads it differently, from token {self.first:,} of a row on"
        elif self.outcome != "same":
            reads = "reads it differently"
        return (
            f"{self._start} {self.version} on {self.date}: {reads} ({self.equal:.1%} of {self.positions:,} next tokens "
            f"are equal, {self.different:.1%} differ by more than rounding)."
        )

    @property
    def _start(self) -> str:
        return f"Compared with {self.runtime}"


def read_receipts(folder: Path) -> list[Receipt]:
    """Return the receipts of a checkpoint. Empty if it has none.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / VERIFIED
    if not file.is_file():
        return []
    with explain_damaged_record(file, "is not a valid record of comparisons", f"Delete {VERIFIED}."):
        content = json.loads(file.read_text(encoding="utf-8"))
        return [Receipt(**values) for values in content["receipts"]]


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write a receipt in place of an earlier one of the same program, and its line into the model card if there is one.

    Raises:
        ModelError: the file of earlier receipts is damaged.
        OSError: a file cannot be written.
    """
    receipts = [earlier for earlier in read_receipts(folder) if earlier.runtime != receipt.runtime]
    receipts.append(receipt)
    text = json.dumps({"receipts": [asdict(entry) for entry in receipts]}, indent=2)
    write_file(folder / VERIFIED, text + "\n")
    card = folder / "README.md"
    if card.is_file():
        write_file(card, _with_line(card.read_text(encoding="utf-8"), receipt))


def _with_line(card: str, receipt: Receipt) -> str:
    """Return a model card with the line of a receipt, in place of an earlier one of the same program."""
    line = f"- {escape_markdown(receipt.describe())}\n"
    earlier = re.compile(rf"^- {re.escape(escape_markdown(receipt._start))} .*\n?", re.MULTILINE)
    if earlier.search(card):
        return earlier.sub(lambda _: line, card, count=1)
    place = card.rfind(_END)
    if place < 0:
        text = card.rstrip()
        is_list = text.rpartition("\n")[2].startswith("- ")
        return f"{text}\n{line}" if is_list else f"{text}\n\n{line}"
    return f"{card[:place].rstrip()}\n{line}\n{card[place:]}"
