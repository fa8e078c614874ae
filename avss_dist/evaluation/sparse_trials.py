"""The sparsities of an experiment: every method at every level, on the cells of `evaluate`, beside the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avss_dist.analysis.sparsity_plans import Measured
from avss_dist.errors import ConfigError
from avss_dist.evaluation.allocation import CHOSEN_BY_TOKEN, Asker, Unreachable, allocate, require_whole_weights
from avss_dist.evaluation.engine import CellReporter, plan_text
from avss_dist.evaluation.evaluate import about, realized, require_effect
from avss_dist.evaluation.retention import retained
from avss_dist.evaluation.sparsify import keep_plan
from avss_dist.evaluation.trial import NO_METHOD, Trial, measured_values, with_fewer_rows
from avss_dist.executors.base import Executor
from avss_dist.intervention import NO_INTERVENTION
from avss_dist.names import FARTHEST_MAP, MAPS_WITHIN, SPARSITY
from avss_dist.pruning.methods import Experiment
from avss_dist.runs.job_file import RunSpec
from avss_dist.settings import INPUTS
from avss_dist.tasks.base import Result
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store


def require_inputs(specs: Sequence[RunSpec], experiment: Experiment) -> None:
    """Refuse runs that would not measure what sparsities are planned from, before anything is scored.

    Raises:
        ConfigError: the message names the setting.
    """
    if not experiment.sparsities:
        return
    for spec in specs:
        for method in experiment.sparsity_methods:
            require_whole_weights(spec.execution.partition, method)
        if missing := [site for site in INPUTS if site not in spec.settings.sites]:
            raise ConfigError(
                f"`sparsities` need what linear maps read, and {spec.model} is scored without {', '.join(missing)}.",
                "Add inputs to `sites` in the settings of the job.",
            )
    for task in experiment.tasks:
        require_effect(experiment.sparsity_rule, task)


def plan_sparsities(
    trials: Sequence[Trial],
    experiment: Experiment,
    warehouse: Warehouse,
    store: Store,
    executor: Executor,
    *,
    reporter: CellReporter | None,
    fresh: bool,
) -> None:
    """A plan for every trial, method and level, and its evaluation on every task."""
    for trial in trials if experiment.sparsities else ():
        run = warehouse.run(trial.run.run_id)
        assert run is not None
        measured = Measured.of(warehouse, run)
        settings = with_fewer_rows(trial.settings, experiment.sparsity_max_sequences)
        ask = Asker(
            checkpoint=trial.checkpoint,
            settings=settings,
            placement=trial.placement,
            store=store,
            executor=executor,
            reporter=reporter,
            fresh=fresh,
            corpus=RedactedURI(trial.corpus),
            text=plan_text(trial.checkpoint, trial.corpus, settings),
        )
        for method in experiment.sparsity_methods:
            again = 0 if method in CHOSEN_BY_TOKEN else experiment.sparsity_corrections
            for level in experiment.sparsities:
                try:
                    made = allocate(ask, measured, level, method, rule=experiment.sparsity_rule, corrections=again)
                except Unreachable:
                    trial.sparsity_plans[method, level] = None
                    continue
                trial.sparsity_plans[method, level] = keep_plan(made, store, run)


def sparse_rows(trial: Trial, task: str, results: Mapping[str, Sequence[Result]]) -> Iterator[dict[str, Any]]:
    """Yield rows of ``experiments`` of a task: what every plan keeps of the dense model, and the sparsity that it had.

    A level that a method cannot reach has one row, without a value.
    """
    whole = {result.metric: result for result in about(results[task], NO_INTERVENTION.key)}
    for (method, level), plan in trial.sparsity_plans.items():
        chosen = NO_METHOD | {"method": method, "score": method, "share": 0.0, "retention": None, "sparsity": level}
        if plan is None:
            yield _valued(SPARSITY, None) | chosen
            continue
        key = plan.intervention.key
        chosen |= key.row()
        for result in about(results[task], key):
            kept = retained(whole[result.metric], result) if result.metric in whole else None
            interval = {"retention_low": kept and kept.low, "retention_high": kept and kept.high}
            yield measured_values(result) | chosen | {"retention": kept and kept.value} | interval
        if near := realized(plan, results[task], plan.intervention):
            yield _valued(MAPS_WITHIN, near.within) | chosen
            yield _valued(FARTHEST_MAP, near.farthest) | chosen


def _valued(metric: str, value: float | None) -> dict[str, Any]:
    """Return the columns that `measured_values` gives, for a value without samples."""
    return {**NO_INTERVENTION.key.row(), "metric": metric, "value": value, "stderr": None}
