"""What an experiment says of sparsities: what each method keeps at each, and the most that keeps enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

from avss_dist.analysis.verdict import primary_metric
from avss_dist.settings import SPARSITY

ENOUGH = (0.99, 0.95)  # retentions that the critical sparsity is told of

Row = Mapping[str, Any]  # of the table `experiments`


@dataclass(frozen=True, kw_only=True)
class Point:
    """A sparsity plan on a task.

    Attributes:
        row: of the metric that speaks for the task.
        measured: the share of the weights that met a zero; None where nothing did.
    """

    row: Row
    measured: float | None

    @property
    def target(self) -> float:
        """The sparsity that was planned."""
        return float(self.row["sparsity"])

    @property
    def kept(self) -> float:
        """The retention."""
        return float(self.row["retention"])


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A method on a task: its points by ascending sparsity."""

    task: str
    method: str
    points: tuple[Point, ...]

    def critical(self, enough: float) -> float:
        """The most sparsity that keeps enough, linear between the points, from all of it at none."""
        places = [(0.0, 1.0), *((point.target, point.kept) for point in self.points)]
        for (s0, kept0), (s1, kept1) in pairwise(places):
            if kept1 < enough:
                return s0 + (s1 - s0) * (kept0 - enough) / (kept0 - kept1)
        return places[-1][0]

    @property
    def sentence(self) -> str:
        """The critical sparsities, in words."""
        last = self.points[-1].target
        said = []
        for enough in ENOUGH:
            most = self.critical(enough)
            said.append(f"{enough:.0%} at a sparsity of {'at least ' if most == last else ''}{most:.1%}")
        return f"{self.task}: {self.method} keeps {', and '.join(said)}."


def is_sparse(row: Row) -> bool:
    """Whether a row is of sparse activations, not of layers that were dropped."""
    return row.get("sparsity") is not None


def sparsity_curves(rows: Sequence[Row]) -> list[Curve]:
    """Of the rows of one run, a curve for each task and method, in their order."""
    tasks = dict.fromkeys(row["task"] for row in rows if is_sparse(row))
    return [curve for task in tasks for curve in _curves(task, [row for row in rows if row["task"] == task])]


def _curves(task: str, rows: Sequence[Row]) -> Iterator[Curve]:
    metric, sparse = primary_metric(rows), [row for row in rows if is_sparse(row)]
    measured = {_key(row): row["value"] for row in sparse if row["metric"] == SPARSITY}
    points: dict[str, list[Point]] = {}
    for row in sorted(sparse, key=lambda row: row["sparsity"]):
        if row["metric"] == metric and _is_told(row):
            points.setdefault(row["method"], []).append(Point(row=row, measured=measured.get(_key(row))))
    for method in dict.fromkeys(row["method"] for row in sparse):
        if method in points:
            yield Curve(task=task, method=method, points=tuple(points[method]))


def _is_told(row: Row) -> bool:
    return row["retention"] is not None and isfinite(row["retention"])


def _key(row: Row) -> tuple[Any, ...]:
    return row["method"], row["sparsity"]
