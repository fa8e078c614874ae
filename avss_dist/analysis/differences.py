"""Differences between models that were evaluated on the same samples: results, sentences and rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from operator import attrgetter

from avss_dist.analysis.section import ReportColumn, interval, known_interval
from avss_dist.analysis.verdict import describe_metric, primary_metric
from avss_dist.core.text import count_of
from avss_dist.core.values import NewRow
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.tasks.results import Difference, Result, metric_differences
from avss_dist.warehouse.reader import grouped

PERCENT = 100  # percentage points in a share of 1
LEAST_ROUNDED = 0.05  # percentage points that round to 0.1; of fewer, a digit is shown


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """A metric of one model, compared with that of another on the same samples of a task.

    Attributes:
        label: name of the model.
        reference: name of the model that it is compared with.
        task: name of the task.
        metric: name of the metric.
        differences: difference of the metric, and of the perplexity of a loss, by name, in the units of the metrics.
            Positive where the model's metric is larger than that of the reference. Empty if there is a ``problem``.
        retained: difference of the retention of the metric, as a share (0.01 is a percentage point). None if there is a
            ``problem``, or if the two have no common whole model.
        problem: reason why there is no difference; None if there is one.
    """

    label: str
    reference: str
    task: str
    metric: str
    differences: Mapping[str, Difference] = field(default_factory=dict)
    retained: Difference | None = None
    problem: str | None = None

    def columns(self, metric: str) -> NewRow:
        """Return the columns of a row that is about a metric, ``loss`` or ``perplexity`` for a loss."""
        difference = self.differences.get(metric)
        note = self.problem
        if difference is not None:
            note = _why_no_interval(difference)
        return {
            "compared_with": self.reference,
            **_difference_columns("difference", difference),
            **_difference_columns("retention_difference", self.retained),
            "difference_note": note,
        }

    def describe(self) -> str:
        """Return a sentence: how much more or less is kept, or, without a whole model, the difference of the metric."""
        if self.problem is not None:
            return f"{self.task}: {self.label} is not compared with {self.reference}: {self.problem}."
        metric = describe_metric(self.metric)
        if self.retained is not None:
            difference = self.retained
            text = self._describe_retained(metric, difference)
            certainty = _describe_certainty(difference, _share_in_points)
        else:
            difference = self.differences[metric]
            text = self._describe_metric(metric, difference)
            certainty = _describe_certainty(difference, "{:z,.4g}".format)
        sentence = f"{self.task}: {text} ({certainty})."
        if difference.may_be_chance:
            sentence += " That may be chance."
        return sentence

    def _describe_retained(self, metric: str, difference: Difference) -> str:
        """Return how much more or less of a metric is kept, as a clause."""
        if difference.value == 0:
            return f"{self.label} keeps as much of the {metric} as {self.reference}"
        direction = "more" if difference.value > 0 else "less"
        points = _share_in_points(abs(difference.value))
        return f"{self.label} keeps {points} points {direction} of the {metric} than {self.reference}"

    def _describe_metric(self, metric: str, difference: Difference) -> str:
        """Return how much higher or lower a metric is, as a clause."""
        if difference.value == 0:
            return f"the {metric} of {self.label} is that of {self.reference}"
        direction = "higher" if difference.value > 0 else "lower"
        amount = f"{abs(difference.value):z,.4g}"
        return f"the {metric} of {self.label} is {amount} {direction} than that of {self.reference}"


def _describe_certainty(difference: Difference, ends: Callable[[float], str]) -> str:
    """Return the interval of a difference in the direction in which it is told, and the number of samples.

    Args:
        ends: format of the ends of the interval.
    """
    if not difference.has_interval:
        return f"no interval: {_why_no_interval(difference)}"
    low = difference.low
    high = difference.high
    if difference.value < 0:
        low, high = -high, -low
    return f"95% interval {ends(low)} to {ends(high)}, {count_of(difference.num_samples, 'sample')}"


def _why_no_interval(difference: Difference) -> str | None:
    """Return the reason why a difference has no interval. None if it has one."""
    if difference.has_interval:
        return None
    if difference.num_differing >= MINIMUM_UNITS:
        return "it is not finite without one of the samples"
    return f"{difference.num_differing:,} of {difference.num_samples:,} samples differ, {MINIMUM_UNITS} are needed"


def _share_in_points(share: float) -> str:
    """Return a share in percentage points with a digit after the point, and few points with their first digit."""
    points = PERCENT * share
    if abs(points) < LEAST_ROUNDED:
        return f"{points:z.1g}"
    return f"{points:z,.1f}"


def _difference_columns(name: str, difference: Difference | None) -> NewRow:
    """Return the columns of a difference and the ends of its interval. They are null without one."""
    if difference is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: difference.value, f"{name}_low": difference.low, f"{name}_high": difference.high}


NO_COLUMNS: NewRow = {
    "compared_with": None,
    **_difference_columns("difference", None),
    **_difference_columns("retention_difference", None),
    "difference_note": None,
}
"""Columns of a row that is compared with no other."""


def compare_results(
    own: Result, other: Result | None, whole: Result | None, *, label: str, reference: str, task: str
) -> PairedComparison:
    """Return the comparison of two results in one metric of a task, which read the same samples.

    Args:
        other: result of the reference; None if it has none in this metric.
        whole: result of the whole model of both; None if there is none, or if theirs are not the same.
        label: name of the model of ``own``.
        reference: name of the model of ``other``.
        task: name of the task.
    """
    problem = None
    if other is None:
        problem = f"{reference} has no {own.metric} there"
    elif len(own.samples) != len(other.samples):
        problem = f"it has {count_of(len(own.samples), 'sample')}, and {reference} {len(other.samples):,}"
    elif not isfinite(own.value - other.value):
        problem = f"their values of {own.metric} are {own.value:g} and {other.value:g}"
    if other is None or problem is not None:
        return PairedComparison(label=label, reference=reference, task=task, metric=own.metric, problem=problem)
    retained = None
    if whole is not None and len(whole.samples) == len(own.samples):
        retained = Difference.of_retention(own, other, whole)
        if not isfinite(retained.value):
            retained = None
    return PairedComparison(
        label=label,
        reference=reference,
        task=task,
        metric=own.metric,
        differences=dict(metric_differences(own, other)),
        retained=retained,
    )


def describe_differences(comparisons: Sequence[PairedComparison]) -> Iterator[str]:
    """Yield a sentence for each model and task, on the primary metric of the task."""
    for of_task in grouped(comparisons, attrgetter("label", "task")).values():
        metric = primary_metric([{"metric": comparison.metric} for comparison in of_task])
        for comparison in of_task:
            if comparison.metric == metric:
                yield comparison.describe()


def _points(share: float) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    return f"{PERCENT * share:+z.1f}"


DIFFERENCE_COLUMNS = (
    ReportColumn("value", "difference", "{:+z.4g}".format, group="difference"),
    ReportColumn("95% interval", "interval", interval("{:+z.4g}".format, " .. "), group="difference", priority=2),
    ReportColumn("points", "retention_difference", _points, group="kept"),
    ReportColumn("95% interval", "retention_interval", interval(_points, " .. "), group="kept", priority=1),
    ReportColumn("samples", "num_samples", "{:,}".format, priority=3),
)
"""Columns of a table of differences, beside those that name the models, the task and the metric."""


def difference_row(comparison: PairedComparison) -> NewRow:
    """Return the values of `DIFFERENCE_COLUMNS`, and ``metric``. A loss is shown as perplexity."""
    metric = describe_metric(comparison.metric)
    columns = comparison.columns(metric)
    difference = comparison.differences.get(metric)
    return {
        **columns,
        "metric": metric,
        "interval": known_interval(columns["difference_low"], columns["difference_high"]),
        "retention_interval": known_interval(columns["retention_difference_low"], columns["retention_difference_high"]),
        "num_samples": None if difference is None else difference.num_samples,
    }
