"""Experiments in a warehouse: the newest one with the layers of each run, whose rows are never mixed with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from avss_dist.core.values import TableRow
from avss_dist.warehouse.reader import grouped


@dataclass(frozen=True, kw_only=True)
class NewestExperiment:
    """The newest experiment that left out layers of one run's model.

    Attributes:
        rows: its rows of the table ``experiments``: those of the whole model, and those without layers.
        older: number of older experiments with the same run.
    """

    rows: Sequence[TableRow]
    older: int = 0

    def describe(self) -> str:
        """Return a sentence that says which experiment this is, and that there are older ones."""
        sentence = f"Experiment {self.rows[0]['experiment_id']}"
        if time := _written_at(self.rows):
            sentence += f" of {time[:16]} UTC"
        if self.older:
            sentence += f", the newest of {self.older + 1:,} with this run"
        return f"{sentence}."


def newest_experiments(rows: Sequence[TableRow]) -> dict[str, NewestExperiment]:
    """Return the newest experiment of each run that has one, by run id.

    Args:
        rows: rows of the table ``experiments``. Those of residual scales and sparsities, of earlier versions, are left
            out.
    """
    newest = {}
    for run_id, of_run in grouped(rows, itemgetter("run_id")).items():
        readable = [row for row in of_run if _is_read(row)]
        experiments = []
        for of_experiment in grouped(readable, itemgetter("experiment_id")).values():
            if any(row["share"] for row in of_experiment):
                experiments.append(of_experiment)
        if experiments:
            experiments.sort(key=_written_at)
            newest[run_id] = NewestExperiment(rows=experiments[-1], older=len(experiments) - 1)
    return newest


def _is_read(row: TableRow) -> bool:
    """Whether a row is about the whole model, or about the model without layers."""
    if row["score"] is None:
        return True
    return bool(row["share"]) and not row.get("factor")


def _written_at(rows: Sequence[TableRow]) -> str:
    """Return when the last of an experiment's rows was written, empty if it is unknown."""
    return max(str(row["created_at"] or "") for row in rows)
