"""Candidates of an experiment, and their rows of the table ``experiments``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avss_dist.analysis.experiment_choices import control_name, describe_method
from avss_dist.analysis.verdict import WHOLE
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.values import NewRow
from avss_dist.evaluation.session import results_under
from avss_dist.plans.choice import Choice
from avss_dist.stats.catalog import RANDOM, READING
from avss_dist.stats.metrics import CHANCE, LOSS
from avss_dist.tasks.results import Result, Retention


@dataclass(frozen=True)
class Candidate:
    """A model that an experiment evaluates.

    Attributes:
        choice: the choice of its layers; None for the whole model.
        intervention: the change of the model.
        repair: name of its repair; None without one.
    """

    choice: Choice | None
    intervention: Intervention
    repair: str | None = None


WHOLE_MODEL = Candidate(choice=None, intervention=NO_INTERVENTION)


def candidate_rows(candidate: Candidate, results: Sequence[Result], guess: float | None) -> list[NewRow]:
    """Return the row of every metric of a task, and for the whole model that of guessing tokens.

    They are rows of ``experiments`` without the columns of RunIdentity.

    Args:
        results: results of the task, those of the whole model included.
        guess: loss of a guess among all tokens, in nats per token; None if it is unknown.
    """
    changed = candidate.intervention.key.row()
    method = _method_columns(candidate)
    whole_model = {result.metric: result for result in results_under(results)}
    rows = []
    for result in results_under(results, candidate.intervention.key):
        metric = {"metric": result.metric, "value": result.value, "stderr": result.stderr}
        before = whole_model.get(result.metric)
        if candidate.choice is None:
            retained = _retention_columns(1.0)
        elif before is None:
            retained = _retention_columns(None)
        else:
            retention = Retention.of(before, result)
            retained = _retention_columns(retention.value, retention.low, retention.high)
        rows.append({**changed, **metric, **method, **retained})
    if candidate.choice is None and guess is not None and LOSS in whole_model:
        chance = {"metric": CHANCE, "value": guess, "stderr": None}
        rows.append({**changed, **chance, **method, **_retention_columns(1.0)})
    return rows


def _method_columns(candidate: Candidate) -> NewRow:
    """Return the columns of ``experiments`` that tell how the layers of a candidate were chosen and repaired."""
    choice = candidate.choice
    if choice is None:
        return {
            "method": WHOLE,
            "share": 0.0,
            "score": None,
            **dict.fromkeys(READING),
            "control": None,
            "seed": None,
            "repair": candidate.repair,
        }
    reading: NewRow = dict.fromkeys(READING)
    if choice.reading is not None:
        reading = dict(zip(READING, choice.reading, strict=True))
    return {
        "method": describe_method(choice),
        "share": choice.share,
        "score": choice.by,
        **reading,
        "control": control_name(choice),
        "seed": choice.seed if choice.by == RANDOM else None,
        "repair": candidate.repair,
    }


def _retention_columns(value: float | None, low: float | None = None, high: float | None = None) -> NewRow:
    return {"retention_low": low, "retention_high": high, "retention": value}
