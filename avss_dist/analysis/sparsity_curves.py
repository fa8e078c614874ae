"""Sparsity curves of an experiment: retention of each method by sparsity, and the critical sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

from avss_dist.analysis.verdict import describe_task, primary_metric, retention_interval
from avss_dist.core.names import FARTHEST_MAP, MAPS_WITHIN, SPARSITY

ENOUGH = (0.99, 0.95)  # retentions whose critical sparsity is reported

Row = Mapping[str, Any]  # of the table `experiments`


@dataclass(frozen=True, kw_only=True)
class Point:
    """The result of a sparsity plan on a task.

    Attributes:
        row: row of ``experiments`` with the task's primary metric.
        measured: share of the weights that met a zero input, or None if it was not measured.
        within: share of the linear maps within one percentage point of their planned sparsity, or None.
        farthest: largest deviation of a linear map from its planned sparsity, or None.
    """

    row: Row
    measured: float | None
    within: float | None = None
    farthest: float | None = None

    @property
    def target(self) -> float:
        """Planned sparsity."""
        return float(self.row["sparsity"])

    @property
    def retention(self) -> float:
        """Retention of the task's primary metric."""
        return float(self.row["retention"])

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the retention, or None if too few samples differ."""
        return retention_interval(self.row)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Retention of a method on a task by sparsity.

    Attributes:
        points: results by ascending sparsity.
    """

    task: str
    method: str
    points: tuple[Point, ...]

    def critical(self, enough: float) -> float:
        """Return the largest sparsity up to which the retention is at least ``enough``.

        The curve is linear between the points and starts at a retention of 1 without sparsity.
        """
        places = [(0.0, 1.0), *((point.target, point.retention) for point in self.points)]
        for (s0, kept0), (s1, kept1) in pairwise(places):
            if kept1 < enough:
                return s0 + (s1 - s0) * (kept0 - enough) / (kept0 - kept1)
        return places[-1][0]

    @property
    def sentence(self) -> str:
        """Sentence with the critical sparsities."""
        task = describe_task(self.task)
        last = self.points[-1].target
        texts = []
        for enough in ENOUGH:
            sparsity = self.critical(enough)
            at_least = "at least " if sparsity == last else ""
            texts.append(f"{enough:.0%} at a sparsity of {at_least}{sparsity:.1%}")
        return f"{task}: {self.method} keeps {', and '.join(texts)}."


def is_sparse(row: Row) -> bool:
    """Whether a row is the result of a sparsity plan."""
    return row.get("sparsity") is not None


def sparsity_curves(rows: Sequence[Row]) -> list[Curve]:
    """Return a curve for each task and method of one run, in the order of its rows."""
    tasks = dict.fromkeys(row["task"] for row in rows if is_sparse(row))
    return [curve for task in tasks for curve in _curves(task, [row for row in rows if row["task"] == task])]


def _curves(task: str, rows: Sequence[Row]) -> Iterator[Curve]:
    metric, sparse = primary_metric(rows), [row for row in rows if is_sparse(row)]
    values = {(row["method"], row["sparsity"], row["metric"]): row["value"] for row in sparse}
    points: dict[str, list[Point]] = {row["method"]: [] for row in sparse}
    for row in sorted(sparse, key=lambda row: row["sparsity"]):
        if row["metric"] == metric and _has_retention(row):
            series = row["method"], row["sparsity"]
            measured, within, farthest = (values.get((*series, name)) for name in (SPARSITY, MAPS_WITHIN, FARTHEST_MAP))
            points[row["method"]].append(Point(row=row, measured=measured, within=within, farthest=farthest))
    for method, of_method in points.items():
        if of_method:
            yield Curve(task=task, method=method, points=tuple(of_method))


def _has_retention(row: Row) -> bool:
    return row["retention"] is not None and isfinite(row["retention"])
