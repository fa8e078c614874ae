"""State of a scored run in an experiment: layers that every method drops, and the rows of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np

from avss_dist.analysis.verdict import WHOLE
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, InterventionKey, Removals
from avss_dist.core.names import CHANCE, CONTRAST, FARTHEST_MAP, LOSS, MAPS_WITHIN, SPARSITY
from avss_dist.core.registry import INTERACTIONS
from avss_dist.core.settings import Settings
from avss_dist.evaluation.evaluate import realized
from avss_dist.evaluation.session import PlacedModel, PlannedTask, Retention, StoredPatch, about
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import text_config
from avss_dist.pruning.ground_truth import Interactions
from avss_dist.pruning.interactions import quadratic
from avss_dist.pruning.methods import Experiment, Method, methods
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.selection import Reading, count_layers
from avss_dist.runs.run import Run
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Result
from avss_dist.warehouse.schema import RunIdentity

Layers = tuple[int, ...]
Chosen = tuple[Method, float, Layers]  # a method, the share of layers, and the layers


@dataclass
class Trial:
    """State of a scored run in an experiment.

    Attributes:
        model: the checkpoint of the run.
        rows: rows of the table ``scores``.
        truth: measurements of the layers, float64[layers], by a name of ``registry.MEASURED``.
        interactions: interactions of the layers, if sets are chosen by them.
        searched: layers that a search found, by method and share.
        contrasts: contrasts of the layers on paired text, float64[layers], by reading.
        planned: tasks by name.
        choices: layers that every method drops at every share.
        sparsity_plans: plan by method of allocation and level; None if the method cannot reach the level.
        fits: task of fitting each repair except `pruning.repair.registry.NO_REPAIR`.
        patches: fitted patches, by the fit's id and the dropped layers.
    """

    run: Run
    model: PlacedModel
    rows: Sequence[Mapping[str, Any]]
    corpus: str
    truth: dict[str, Float64] = field(default_factory=dict)
    interactions: Interactions | None = None
    searched: dict[tuple[Method, float], Layers] = field(default_factory=dict)
    contrasts: dict[Reading, Float64] = field(default_factory=dict)
    planned: dict[str, PlannedTask] = field(default_factory=dict)
    choices: list[Chosen] = field(default_factory=list)
    sparsity_plans: dict[tuple[str, float], SparsityPlan | None] = field(default_factory=dict)
    fits: dict[str, PlannedTask] = field(default_factory=dict)
    patches: Mapping[tuple[str, Removals], StoredPatch] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        """Checkpoint of the run."""
        return self.model.checkpoint

    @property
    def settings(self) -> Settings:
        """Settings of the run, with every ``auto`` decided."""
        return self.model.settings

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return count_layers(self.rows)

    @property
    def drops(self) -> list[Layers]:
        """Sets of layers that are dropped, each once."""
        return list(dict.fromkeys(drop for _, _, drop in self.choices))

    def reading(self, most: int | None) -> PlacedModel:
        """Return the model with at most ``most`` rows of a text; None keeps the limit of the run."""
        rows = [self.settings.max_sequences, most]
        return self.model.reading(min((number for number in rows if number), default=None))

    def without(self, drop: Layers, repair: str = NO_REPAIR) -> Intervention:
        """Return the intervention that removes layers, with the patch of a repair if it changed weights."""
        fit = self.fits.get(repair)
        return Intervention(removed=drop, patch=self.patches.get((fit.run_id(), drop)) if fit else None)

    def interventions(self, experiment: Experiment) -> list[Intervention]:
        """Return all evaluated interventions: none, every choice by every factor and repair, every sparsity plan."""
        repaired = [self.without(drop, repair) for drop in self.drops for repair in experiment.repairs]
        factors = dict.fromkeys(filter(None, experiment.factors))
        scaled = [Intervention(removed=drop, residual_scale=factor) for factor in factors for drop in self.drops]
        sparse = [plan.intervention for plan in self.sparsity_plans.values() if plan]
        removed = repaired if 0 in experiment.factors else []
        return list(dict.fromkeys([NO_INTERVENTION, *removed, *scaled, *sparse]))

    @property
    def identity(self) -> RunIdentity:
        """Identity of the run."""
        name, revision = self.checkpoint.name, self.checkpoint.revision
        return RunIdentity(run_id=self.run.run_id, model=name, revision=revision, family=self.rows[0]["family"])

    def choose(self, experiment: Experiment) -> list[Chosen]:
        """Return the layers that every method drops at every share."""
        return [
            (method, share, self._drop(method, share))
            for method in methods(experiment, self.rows)
            for share in experiment.shares
        ]

    def _drop(self, method: Method, share: float) -> Layers:
        if (method, share) in self.searched:
            return self.searched[method, share]
        choice = method.choice(share)
        if method.score == INTERACTIONS:
            assert self.interactions is not None
            number = choice.number(self.num_layers)
            return quadratic(self.interactions.b, self.interactions.h, number, choice.first, choice.last)
        if method.score == CONTRAST and method.reading is not None:
            return choice.drop(-self.contrasts[method.reading])
        return choice.drop(choice.scores(self.rows, self.truth))


def guessed_loss(trial: Trial) -> float | None:
    """Return the loss of a guess among all tokens, in nats per token; None for a vocabulary of unknown size."""
    config = text_config(trial.checkpoint, trust_remote_code=trial.settings.trust_remote_code)
    size = getattr(config.get_text_config(), "vocab_size", None)
    return float(np.log(size)) if size else None


def rows_of(trial: Trial, experiment: Experiment, results: Mapping[str, Sequence[Result]]) -> Iterator[dict[str, Any]]:
    """Yield rows of ``experiments``, task by task, less the columns of RunIdentity.

    Args:
        results: results by task.
    """
    guess = guessed_loss(trial)
    for task in trial.planned:
        by_key: dict[InterventionKey, list[Result]] = {}
        for result in results[task]:
            if result.layer is None:
                by_key.setdefault(result.intervention, []).append(result)
        rows = list(_whole_rows(by_key[NO_INTERVENTION.key], guess))
        for factor in experiment.factors:
            rows += _choice_rows(trial, experiment.repairs, factor, by_key)
        for row in rows:
            yield {"task": task, "created_at": datetime.now(UTC), **row}


def _whole_rows(results: Sequence[Result], guess: float | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the whole model, and the row of a guess if a loss is among them."""
    whole = [measured_values(result) for result in results]
    if guess is not None and any(row["metric"] == LOSS for row in whole):
        whole.append({**NO_INTERVENTION.key.row(), "metric": CHANCE, "value": guess, "stderr": None})
    for row in whole:
        yield {**row, "method": WHOLE, "share": 0.0, **NO_METHOD, "retention": 1.0}


def _choice_rows(
    trial: Trial, repairs: Sequence[str], factor: float, results: Mapping[InterventionKey, Sequence[Result]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every method at every share with every repair, beside the whole model."""
    whole = {result.metric: result for result in results[NO_INTERVENTION.key]}
    for (method, share, drop), repair in product(trial.choices, repairs):
        for result in results[replace(trial.without(drop, repair), residual_scale=factor).key]:
            left = Retention.of(whole[result.metric], result)
            yield {
                **measured_values(result),
                "method": method.label,
                "share": share,
                "repair": None if repair == NO_REPAIR else repair,
                "score": method.score,
                **dict(zip(_READING, method.reading or [None] * len(_READING), strict=True)),
                "control": method.control,
                "seed": method.seed,
                "retention": left.value,
                "retention_low": left.low,
                "retention_high": left.high,
            }


_READING = ("site", "recipe", "threshold", "threshold_kind")
NO_METHOD = dict.fromkeys(("score", *_READING, "control", "seed", "repair", "retention_low", "retention_high"))


def measured_values(result: Result) -> dict[str, Any]:
    """Return the columns of ``experiments`` for a result."""
    values = {"metric": result.metric, "value": result.value, "stderr": result.stderr}
    return {**result.intervention.row(), **values, "sparsity": None}


def sparse_rows(trial: Trial, task: str, results: Mapping[str, Sequence[Result]]) -> Iterator[dict[str, Any]]:
    """Yield rows of ``experiments`` of a task: retention of every sparsity plan, and its realized sparsity.

    A level that a method cannot reach has one row, without a value.
    """
    whole = {result.metric: result for result in about(results[task])}
    for (method, level), plan in trial.sparsity_plans.items():
        chosen = NO_METHOD | {"method": method, "score": method, "share": 0.0, "retention": None, "sparsity": level}
        if plan is None:
            yield _valued(SPARSITY, None) | chosen
            continue
        key = plan.intervention.key
        chosen |= key.row()
        for result in about(results[task], key):
            left = Retention.of(whole[result.metric], result) if result.metric in whole else None
            interval = {"retention_low": left and left.low, "retention_high": left and left.high}
            yield measured_values(result) | chosen | {"retention": left and left.value} | interval
        if near := realized(plan, results[task], plan.intervention):
            yield _valued(MAPS_WITHIN, near.within) | chosen
            yield _valued(FARTHEST_MAP, near.farthest) | chosen


def _valued(metric: str, value: float | None) -> dict[str, Any]:
    """Return the columns that `measured_values` gives, for a value without samples."""
    return {**NO_INTERVENTION.key.row(), "metric": metric, "value": value, "stderr": None}
