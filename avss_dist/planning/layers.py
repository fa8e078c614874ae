"""Plans of layers to drop: values of a criterion from a warehouse, the choice, and the findings that bear on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from avss_dist.analysis.experiments import newest_experiments
from avss_dist.analysis.findings import describe_depth, findings
from avss_dist.analysis.verdict import verdicts
from avss_dist.core.values import TableRow
from avss_dist.models.checkpoint.layer_kinds import Rule, describe_misread
from avss_dist.planning.criteria import criterion_values, read_layers
from avss_dist.planning.evaluated import evaluated_lines
from avss_dist.planning.patterns import pattern_of, rules_of_run
from avss_dist.plans.choice import Choice
from avss_dist.plans.criteria import PUBLISHED, Criterion, CriterionValues, LayerValues
from avss_dist.plans.pattern import Pattern
from avss_dist.plans.plan import Plan
from avss_dist.plans.run_layers import RunLayers, plan_choice
from avss_dist.stats.catalog import FROM_ACTIVATIONS, LAST, RANDOM
from avss_dist.stats.rankings import depth_correlation
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse


def plan_layers(warehouse: Warehouse, run: TableRow, choice: Choice) -> Plan:
    """Return the plan of a choice of layers of a run's checkpoint, by what a warehouse or the user has measured.

    Args:
        run: a row of ``runs``.

    Raises:
        QueryError: the warehouse lacks the score.
        WarehouseError: the scores of the run are damaged.
        PlanError: no plan satisfies the choice. See `Choice.choose`.
    """
    return LayerRanking.of_run(warehouse, run, choice.criterion).plan(choice)


@dataclass(frozen=True, kw_only=True)
class LayerRanking:
    """Values of a criterion for the layers of a run's checkpoint, from which plans of any size are made."""

    warehouse: Warehouse
    layers: RunLayers
    criterion: Criterion
    values: CriterionValues
    rules: Sequence[Rule] = ()
    """Rules by which programs take the kinds of layers from their places."""

    @classmethod
    def of_run(cls, warehouse: Warehouse, run: TableRow, criterion: Criterion) -> LayerRanking:
        """Return the values of a criterion for the layers of a run's checkpoint.

        Args:
            run: a row of ``runs``.

        Raises:
            QueryError: the warehouse lacks the score.
            WarehouseError: the scores of the run are damaged.
        """
        layers = read_layers(warehouse, run)
        values = criterion_values(warehouse, layers, criterion)
        rules = rules_of_run(run)
        return cls(warehouse=warehouse, layers=layers, criterion=criterion, values=values, rules=rules)

    def plan(self, choice: Choice) -> Plan:
        """Return the plan of a choice by the criterion, with the warehouse's remarks on it.

        These are the findings that bear on the choice, and the evaluations of the model without these layers.

        Raises:
            PlanError: no plan satisfies the choice. See `Choice.choose`.
        """
        plan = plan_choice(self.layers, choice, self.values, self.pattern(choice))
        against = describe_misread(self.rules, plan.keep)
        if isinstance(self.values, LayerValues):
            against += _findings(self.warehouse, self.layers, choice, self.values)
        evaluated = evaluated_lines(self.warehouse, self.layers.run, plan.drop)
        return replace(plan, findings=tuple(against), evaluated=evaluated)

    def pattern(self, choice: Choice) -> Pattern | None:
        """Return the pattern of kinds of layers that a choice keeps; None if it keeps none."""
        return pattern_of(self.rules, self.layers.number) if choice.keep_pattern else None


def _findings(warehouse: Warehouse, layers: RunLayers, choice: Choice, values: LayerValues) -> Iterator[str]:
    """Yield the findings that bear on a choice: about the score, the run, and the experiments on AVSS."""
    if choice.by in (LAST, RANDOM):
        return
    by_layer = values.by_layer(layers.number).tolist()
    depth = describe_depth(choice.by, depth_correlation(by_layer), len(by_layer))
    if depth:
        yield depth
    if choice.by not in FROM_ACTIVATIONS:
        return
    run_id = layers.run["run_id"]
    # A finding without a site and a recipe is of the whole run.
    sites: set[str | None] = {None}
    recipes: set[str | None] = {None}
    site, recipe, value, kind = choice.reading or PUBLISHED
    if choice.by == "avss":
        sites.add(site)
        recipes.add(recipe)
    for row in findings(warehouse, [run_id], threshold=Threshold(value=value, kind=kind)).to_pylist():
        if row["kind"] != "tracks_depth" and row["site"] in sites and row["recipe"] in recipes:
            yield row["message"]
    if choice.by == "avss":
        rows = warehouse.table("experiments", run_ids=[run_id]).to_pylist()
        for experiment in newest_experiments(rows).values():
            for verdict in verdicts(experiment.rows):
                yield f"{verdict} {experiment.describe()}"
