"""A scored run on its way through an experiment: what every method drops of it, and what each choice kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np

from avss_dist.analysis.verdict import WHOLE
from avss_dist.evaluation.engine import PlannedTask
from avss_dist.evaluation.repairs import StoredPatch
from avss_dist.evaluation.retention import retained
from avss_dist.intervention import NO_INTERVENTION, Intervention, InterventionKey, Removals
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import text_config
from avss_dist.names import CHANCE, CONTRAST, LOSS
from avss_dist.partition.base import Placement
from avss_dist.pruning.ground_truth import Interactions
from avss_dist.pruning.interactions import quadratic
from avss_dist.pruning.methods import Experiment, Method, methods
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.selection import Reading, count_layers
from avss_dist.registry import INTERACTIONS
from avss_dist.runs.run import Run
from avss_dist.settings import Settings
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Result
from avss_dist.warehouse.schema import RunIdentity

Layers = tuple[int, ...]
Chosen = tuple[Method, float, Layers]  # a method, the share of layers, and the layers


@dataclass
class Trial:
    """A scored run on its way through an experiment.

    Attributes:
        rows: of the table ``scores``.
        truth: float64[layers], by one of ``registry.MEASURED``.
        interactions: of the layers, where sets are chosen by them.
        searched: what each method that searches found at each share.
        contrasts: float64[layers] by reading, of paired text.
        planned: the tasks, by name.
        choices: what every method drops of every share.
        sparsity_plans: of each method of spreading a sparsity, and level; None where the method cannot reach it.
        fits: the task of fitting each repair; none of `pruning.repair.registry.NO_REPAIR`.
        patches: what was fitted, by the fit's id and the layers that are dropped.
    """

    run: Run
    checkpoint: Checkpoint
    settings: Settings
    placement: Placement
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
    def num_layers(self) -> int:
        """Of the model."""
        return count_layers(self.rows)

    @property
    def drops(self) -> list[Layers]:
        """The sets of layers that are dropped, each once."""
        return list(dict.fromkeys(drop for _, _, drop in self.choices))

    def without(self, drop: Layers, repair: str = NO_REPAIR) -> Intervention:
        """Return the intervention without some layers, repaired; a repair may change no weights."""
        fit = self.fits.get(repair)
        return Intervention(removed=drop, patch=self.patches.get((fit.run_id(), drop)) if fit else None)

    def interventions(self, experiment: Experiment) -> list[Intervention]:
        """Return all that is evaluated: no intervention, every choice by every factor and repair, every sparsity."""
        repaired = [self.without(drop, repair) for drop in self.drops for repair in experiment.repairs]
        factors = dict.fromkeys(filter(None, experiment.factors))
        scaled = [Intervention(removed=drop, residual_scale=factor) for factor in factors for drop in self.drops]
        sparse = [plan.intervention for plan in self.sparsity_plans.values() if plan]
        removed = repaired if 0 in experiment.factors else []
        return list(dict.fromkeys([NO_INTERVENTION, *removed, *scaled, *sparse]))

    @property
    def identity(self) -> RunIdentity:
        """Of the run."""
        of = self.checkpoint
        return RunIdentity(run_id=self.run.run_id, model=of.name, revision=of.revision, family=self.rows[0]["family"])

    def choose(self, experiment: Experiment) -> list[Chosen]:
        """What every method drops of every share."""
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


def with_fewer_rows(settings: Settings, most: int | None) -> Settings:
    """Settings that read no more than so many rows of a text; as they are for None."""
    rows = [settings.max_sequences, most]
    return replace(settings, max_sequences=min((n for n in rows if n), default=None))


def guessed_loss(trial: Trial) -> float | None:
    """The loss of a guess among all tokens, in nats per token; None where the vocabulary's size is not known."""
    config = text_config(trial.checkpoint, trust_remote_code=trial.settings.trust_remote_code)
    size = getattr(config.get_text_config(), "vocab_size", None)
    return float(np.log(size)) if size else None


def rows_of(trial: Trial, experiment: Experiment, results: Mapping[str, Sequence[Result]]) -> Iterator[dict[str, Any]]:
    """Yield rows of ``experiments``, task by task, less the columns of RunIdentity.

    Args:
        results: by task.
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
    """The whole model, and of a loss what a guess makes of it."""
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
            kept = retained(whole[result.metric], result)
            yield {
                **measured_values(result),
                "method": method.label,
                "share": share,
                "repair": None if repair == NO_REPAIR else repair,
                "score": method.score,
                **dict(zip(_READING, method.reading or [None] * len(_READING), strict=True)),
                "control": method.control,
                "seed": method.seed,
                "retention": kept.value,
                "retention_low": kept.low,
                "retention_high": kept.high,
            }


_READING = ("site", "recipe", "threshold", "threshold_kind")
NO_METHOD = dict.fromkeys(("score", *_READING, "control", "seed", "repair", "retention_low", "retention_high"))


def measured_values(result: Result) -> dict[str, Any]:
    """Return the columns of ``experiments`` that a result has."""
    values = {"metric": result.metric, "value": result.value, "stderr": result.stderr}
    return {**result.intervention.row(), **values, "sparsity": None}
