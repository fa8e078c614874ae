"""Results of an experiment on one run: retention of the model without the layers that each method chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avss_dist.analysis.verdict import (
    WHOLE,
    describe_task,
    kept_by_guess,
    primary_metric,
    retention_interval,
    shown_method,
    verdicts,
)
from avss_dist.core.intervention import Removals, decode_removals

Row = Mapping[str, Any]  # of the table `experiments`


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """A task of an experiment and its primary metric.

    Attributes:
        name: name of the task in the warehouse.
        metric: the task's primary metric.
        guess: retention of a model that guesses, or None if unknown.
    """

    name: str
    metric: str
    guess: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a method on a task.

    Attributes:
        value: value of the task's metric.
        retention: the value relative to that of the whole model. For a loss, exp(whole - value).
        interval: 95% interval of the retention, or None if too few samples differ.
    """

    value: float
    retention: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """A set of layers that a method chose, with its results.

    Attributes:
        method: name of the method.
        share: requested share of the layers, 0 for the whole model.
        drop: the removed layers and sublayers.
        outcomes: results by task name.
    """

    method: str
    share: float
    drop: Removals
    outcomes: Mapping[str, Outcome]

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole model, the reference of the others."""
        return self.method == WHOLE


@dataclass(frozen=True, kw_only=True)
class ExperimentResults:
    """Results of an experiment on dropped layers.

    Attributes:
        tasks: the evaluated tasks.
        methods: the results of each share and method, by ascending share.
        verdicts: a paragraph for each task and repair on which the claim was tested.
    """

    tasks: tuple[TaskMetric, ...]
    methods: tuple[MethodResult, ...]
    verdicts: tuple[str, ...]

    @property
    def lacks_interval(self) -> bool:
        """Whether the retention of some method has no interval."""
        compared = (outcome for result in self.methods if not result.is_whole for outcome in result.outcomes.values())
        return any(outcome.interval is None for outcome in compared)


def experiment_results(rows: Sequence[Row]) -> ExperimentResults | None:
    """Return the results on dropped layers of one run, or None if no layers were dropped.

    Args:
        rows: rows of ``experiments``, oldest first. The last of repeated evaluations counts.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["score"] is None or (row["share"] and not row.get("factor")):  # not those of sparsities, of version 0.2
            newest[shown_method(row), row["share"], row["task"], row["metric"]] = row
    by_task: dict[str, list[Row]] = {}
    for row in newest.values():
        by_task.setdefault(row["task"], []).append(row)
    if not any(row["share"] for row in newest.values()):
        return None
    metrics = {task: primary_metric(of_task) for task, of_task in by_task.items()}
    primary = [row for row in newest.values() if row["metric"] == metrics[row["task"]]]
    named = [{**row, "task": describe_task(row["task"])} for row in newest.values()]
    return ExperimentResults(
        tasks=tuple(
            TaskMetric(name=task, metric=metrics[task], guess=kept_by_guess(of_task, metrics[task]))
            for task, of_task in by_task.items()
        ),
        methods=_by_method(sorted(primary, key=lambda row: float(row["share"]))),
        verdicts=tuple(verdicts(named)),
    )


def _by_method(rows: Sequence[Row]) -> tuple[MethodResult, ...]:
    """Return a result for each share and method, in the order of the rows."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["share"], shown_method(row)), []).append(row)
    return tuple(
        MethodResult(
            method=method,
            share=share,
            drop=decode_removals(group[0]["drop"]),
            outcomes={row["task"]: _outcome(row) for row in group},
        )
        for (share, method), group in groups.items()
    )


def _outcome(row: Row) -> Outcome:
    return Outcome(value=row["value"], retention=row["retention"], interval=retention_interval(row))
