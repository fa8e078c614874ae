"""Number of evaluations of an experiment, and the refusal of more than the user can have meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avss_dist.analysis.experiment_choices import Experiment
from avss_dist.evaluation.limits import require_intended, require_listable
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.stats.catalog import RECIPES
from avss_dist.stats.scores import RELATIVE_THRESHOLDS

MOST_EVALUATIONS = 10_000
"""Evaluations of a model on a task that an experiment makes without ``allow_many``."""


def describe_size(job: JobFile) -> str:
    """Return a sentence with the maximum number of evaluations of an experiment, and its factors."""
    assert job.experiment is not None
    size = _Size.of_experiment(job.specs, job.experiment)
    return size.text.format(f"{size.evaluations:,}")


@dataclass(frozen=True)
class _Size:
    """Size of an experiment.

    Attributes:
        evaluations: maximum number of evaluations of a model on a task.
        text: sentence about it, with a place for the number.
    """

    evaluations: int
    text: str

    @classmethod
    def of_experiment(cls, specs: Sequence[RunSpec], experiment: Experiment) -> _Size:
        tasks = len(experiment.tasks)
        repairs = len(experiment.repairs)
        counts = []
        for spec in specs:
            thresholds = len(spec.settings.thresholds) + len(RELATIVE_THRESHOLDS)
            readings = len(spec.settings.sites) * len(RECIPES) * thresholds
            counts.append(experiment.count_choices(readings))
        models_with_changes = sum(1 + count * repairs for count in counts)
        return cls(
            models_with_changes * tasks,
            f"The experiment makes up to {{}} evaluations (models: {len(specs):,}, sets of layers to drop: "
            f"{max(counts, default=0):,}, repairs: {repairs:,}, tasks: {tasks:,})",
        )


def require_size(specs: Sequence[RunSpec], experiment: Experiment, *, allow_many: bool) -> None:
    """Refuse an experiment of so many evaluations that they cannot be listed, or were hardly intended."""
    size = _Size.of_experiment(specs, experiment)
    fewer = "Lower `random`, or name fewer `scores`, `shares`, `repairs` or `tasks`."
    allowed = allow_many or experiment.allow_many
    require_listable(size.evaluations, "evaluations", fewer)
    require_intended(size.evaluations, MOST_EVALUATIONS, size.text, fewer, allow_many=allowed)
