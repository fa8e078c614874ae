"""Pruning plans from a warehouse: the score to choose layers or experts by, and the findings that bear on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from avss_dist.analysis.chosen import ChosenRun, newest_run
from avss_dist.analysis.experiments import newest_experiments
from avss_dist.analysis.experts import require_experts
from avss_dist.analysis.findings import describe_depth, expert_findings, findings
from avss_dist.analysis.own_scores import own_score
from avss_dist.analysis.thresholds import quantiles_of
from avss_dist.analysis.verdict import describe_metric, primary_metric, shown_value, verdicts
from avss_dist.core.errors import ModelError, QueryError
from avss_dist.core.intervention import (
    SPARSITY_RULES,
    THRESHOLD,
    TOP_K,
    InterventionKey,
    Removals,
    decode_removals,
)
from avss_dist.core.settings import Settings
from avss_dist.core.thresholds import describe_threshold
from avss_dist.corpus.seen import SeenText, distinct
from avss_dist.plans.choice import (
    LAST,
    PUBLISHED,
    RANDOM,
    Choice,
    Reading,
    Rows,
    choose_experts,
    count_layers,
    reading_of,
)
from avss_dist.plans.ground_truth import (
    ablate_command,
    describe_headless,
    find_layer_truth,
    layer_truth,
    repeated_command,
)
from avss_dist.plans.map_plans import MapPlan, SparsityPlan
from avss_dist.plans.plan import Plan, make_plan, plan_of
from avss_dist.stats.catalog import BLOCK_DISTANCE, FROM_ACTIVATIONS, GREEDY, MEASURED, SCORES
from avss_dist.stats.layer_stats import Float64, LayerStats
from avss_dist.stats.metrics import LOSS
from avss_dist.stats.rankings import depth_correlation
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import has_head, settings_of
from avss_dist.warehouse.names import MEASURED_ONLY, SEARCH, describe_task
from avss_dist.warehouse.reader import Warehouse, grouped

if TYPE_CHECKING:
    from avss_dist.tasks.task import Retention


OTHER_CHANGES = ("layer", "patch", "sparsity_plan", "factor", "rounding")
"""Columns of ``evaluations`` that tell changes of a model besides layers that are left out."""
LARGEST_SPARSITY = 1 - 1e-9  # A plan has no map with a sparsity of 1.


def plan_layers(
    warehouse: Warehouse, run: Mapping[str, Any], *, by: str | None = None, reading: Reading = PUBLISHED, **options: Any
) -> Plan:
    """Return a pruning plan for the checkpoint of a run, with the warehouse's findings and evaluations of it.

    Args:
        run: a row of ``runs``.
        by: a name of ``stats.catalog.SCORES``, or of a score that people bring, see `own_score`. None selects
            `default_score`.
        reading: site, recipe, threshold and threshold kind of AVSS.
        options: the other fields of `Choice`: ``share``, ``count``, ``first``, ``last``, and so on.

    Raises:
        QueryError: if no score was named and there is no default, or the warehouse lacks the named score.
        WarehouseError: if the scores of the run are damaged.
        ConfigError: if a value is out of range.
        PlanError: if no plan satisfies the choice. See `Choice.drop` and `make_plan`.
    """
    score = by or default_score(warehouse, run)
    choice = Choice(by=score, reading=reading if by == "avss" else None, **options)
    if choice.by in FROM_ACTIVATIONS:
        _require_scored(warehouse, run, choice.by)
    rows: Rows
    if run.get("status") == MEASURED_ONLY:
        rows = _unscored_layers(warehouse, run)
    else:
        rows = warehouse.read_scores(run["run_id"])
    if choice.by == "avss":
        rows = _rows_of_reading(rows, reading)
    truth = None
    if choice.by in MEASURED or choice.by == BLOCK_DISTANCE:
        truth = layer_truth(warehouse, run, choice.by)
    elif choice.by not in SCORES:
        truth = own_score(choice.by, warehouse, {**run, "num_layers": count_layers(rows)})
    plan = make_plan(rows, run, choice, truth)
    against: list[str] = []
    if choice.by != BLOCK_DISTANCE:
        known = {choice.by: truth.by_layer(plan.num_layers)} if truth else {}
        values = choice.scores(rows, known)
        against = list(_findings(warehouse, run, choice, values.tolist()))
    return replace(plan, findings=tuple(against), evaluated=evaluated_lines(warehouse, run, plan.drop))


def _rows_of_reading(rows: Rows, reading: Reading) -> Rows:
    """Return the rows of ``scores`` of a reading of AVSS.

    Raises:
        QueryError: there are none. The message has the readings that there are.
    """
    of_reading = [row for row in rows if reading_of(row) == reading]
    if not of_reading:
        scored = sorted({_describe(reading_of(row)) for row in rows})
        raise QueryError(f"No scores of {_describe(reading)}.", f"There are: {'; '.join(scored) or 'none'}.")
    return of_reading


def _require_scored(warehouse: Warehouse, run: Mapping[str, Any], by: str) -> None:
    """Raise QueryError if a checkpoint was not scored, and lacks a score of activations."""
    if run.get("status") == MEASURED_ONLY:
        raise QueryError(
            f"{run['model']} was not scored, and `by` {by} is a score.",
            f"Do: {repeated_command('score', warehouse, run)}",
        )


def _unscored_layers(warehouse: Warehouse, run: Mapping[str, Any]) -> Rows:
    """Return the indices and names of the layers of a checkpoint that was not scored, by its configuration.

    Raises:
        QueryError: the layers are not known without scores.
    """
    from avss_dist.models.checkpoint.loading import candidate_layers
    from avss_dist.models.checkpoint.locate import find_checkpoint
    from avss_dist.models.checkpoint.size import load_skeleton

    settings = Settings(layers=settings_of(run).get("layers"))
    model, _ = load_skeleton(find_checkpoint(run["model"]), settings)
    lists = candidate_layers(model, settings.layers)
    if len(lists) != 1:
        raise QueryError(
            f"{run['model']} was not scored, and its layers are not known without it.",
            f"Do: {repeated_command('score', warehouse, run)}",
        )
    ((path, modules),) = lists.items()
    return [{"layer": index, "layer_name": f"{path}.{index}"} for index in range(len(modules))]


def plan_experts(warehouse: Warehouse, run: Mapping[str, Any], by: str, share: float, seed: int) -> Plan:
    """Return a plan that drops routed experts of the checkpoint of a run, with the findings about its experts.

    Args:
        run: a row of ``runs`` whose experts were measured.
        by: one of ``stats.catalog.EXPERT_SCORES``.
        share: share of the experts of each layer to drop.
        seed: seed of a random choice.

    Raises:
        QueryError: if no experts were measured.
        WarehouseError: if the scores of the run are damaged.
        PlanError: if no plan satisfies the choice. See `choose_experts`.
    """
    layers = require_experts(warehouse, run["run_id"])
    scores = {experts.layer: experts.scores().get(by, experts.load) for experts in layers}
    groups = _routing_groups(run)
    top_k = max(experts.top_k for experts in layers)
    why: dict[str, Any] = {"by": by, "experts": share}
    against = []
    if by == RANDOM:
        why["seed"] = seed
        drop = choose_experts(scores, share, top_k, groups, seed=seed)
    else:
        drop = choose_experts(scores, share, top_k, groups)
        against = [finding["message"] for finding in expert_findings(warehouse, [run["run_id"]])]
    if groups > 1:
        why["groups"] = groups
    plan = plan_of(warehouse.read_scores(run["run_id"]), run, drop, why)
    return replace(plan, findings=tuple(against), evaluated=evaluated_lines(warehouse, run, plan.drop))


def _routing_groups(run: Mapping[str, Any]) -> int:
    """Return the number of groups that routers divide experts into, or 1 if the configuration gives none."""
    from avss_dist.models.checkpoint.locate import fetch_files, locate, read_config

    try:
        checkpoint = locate(run["model"]) or fetch_files(f"{run['model']}@{run['revision']}", ["config.json"])
        config = read_config(checkpoint.folder, checkpoint.name)
    except ModelError:
        return 1
    # Models of several modalities have the configuration of their text model inside.
    for part in (config, *config.values()):
        if isinstance(part, dict) and type(part.get("n_group")) is int:
            groups: int = part["n_group"]
            return groups
    return 1


def plannable_run(warehouse: Warehouse, name: str | None, by: str | None, *, experts: bool = False) -> ChosenRun:
    """Return the newest run whose layers have the score, and whose scores can be read.

    Args:
        name: name of the run, as for `newest_run`.
        by: a name of ``stats.catalog.SCORES``. None selects `default_score`.
        experts: require statistics of routed experts instead.

    Raises:
        QueryError: if there is no such run.
    """

    def require(run: Mapping[str, Any]) -> None:
        if run["status"] != MEASURED_ONLY:
            warehouse.read_scores(run["run_id"])
        if experts:
            require_experts(warehouse, run["run_id"])
        elif by is None:
            default_score(warehouse, run)
        elif by in (*MEASURED, BLOCK_DISTANCE):
            layer_truth(warehouse, run, by)
        elif by in FROM_ACTIVATIONS:
            _require_scored(warehouse, run, by)

    return newest_run(warehouse, name, require, measured=by != GREEDY)


def default_score(warehouse: Warehouse, run: Mapping[str, Any]) -> str:
    """Return the default score to choose layers by: the measured loss, else its estimate, the damage.

    Scores from activations are never the default, because an experiment may refute them for this model.

    Raises:
        QueryError: if neither is measured. The message has the commands that measure them, and the other scores.
    """
    for name in (LOSS, "damage"):
        if find_layer_truth(warehouse, run, name):
            return name
    if not has_head(run):
        hint = "Name the score to choose by with `by`:"
        for name in (*FROM_ACTIVATIONS, LAST, RANDOM):
            hint += f"\n{_describe_meaning(name)}"
        raise QueryError(f"No score was named. {describe_headless(run)}", hint)
    hint = (
        f"Measure the damage, for about 8 passes: {ablate_command(warehouse, run, 'damage')}\n"
        f"Or the loss: {ablate_command(warehouse, run)}\n"
        "Or name the score to choose by with `by`, and evaluate the plan before you believe it:"
    )
    for name in SCORES:
        hint += f"\n{_describe_meaning(name)}"
    raise QueryError(
        f"No score was named, and neither the damage of the layers of {run['model']} nor the loss without each is "
        "measured.",
        hint,
    )


def _describe_meaning(name: str) -> str:
    """Return a line on the meaning of a score."""
    return f"  {name}: {SCORES[name].meaning}"


def _describe(reading: Reading) -> str:
    site, recipe, threshold, kind = reading
    return f"site {site}, recipe {recipe}, threshold {describe_threshold(threshold, kind)}"


def _findings(warehouse: Warehouse, run: Mapping[str, Any], choice: Choice, values: Sequence[float]) -> Iterator[str]:
    """Yield the findings that bear on a choice: about the score, the run, and the experiments on AVSS."""
    if choice.by in (LAST, RANDOM):
        return
    if depth := describe_depth(choice.by, depth_correlation(values), len(values)):
        yield depth
    if choice.by in MEASURED or choice.by not in SCORES:
        return
    # A finding without a site and a recipe is of the whole run.
    sites: set[str | None] = {None}
    recipes: set[str | None] = {None}
    site, recipe, value, kind = choice.reading or PUBLISHED
    if choice.by == "avss":
        sites.add(site)
        recipes.add(recipe)
    for row in findings(warehouse, [run["run_id"]], threshold=Threshold(value=value, kind=kind)).to_pylist():
        if row["kind"] != "tracks_depth" and row["site"] in sites and row["recipe"] in recipes:
            yield row["message"]
    if choice.by == "avss":
        rows = warehouse.table("experiments", run_ids=[run["run_id"]]).to_pylist()
        for experiment in newest_experiments(rows).values():
            for verdict in verdicts(experiment.rows):
                yield f"{verdict} {experiment.describe()}"


def evaluated_lines(warehouse: Warehouse, run: Mapping[str, Any], removed: Removals) -> tuple[str, ...]:
    """Return a line for each task that the model was evaluated on without these layers, beside the whole model.

    It has the rows that were read of a text, and the retention with its interval, where the cells are stored.
    """
    rows = warehouse.table("evaluations", where=pc.field("revision") == run["revision"]).to_pylist()
    by_task = grouped([row for row in rows if _only_removes_layers(row)], itemgetter("run_id", "task"))
    lines: dict[str, None] = {}
    for group in by_task.values():
        metric = primary_metric(group)
        by_removal = {decode_removals(row["drop"]): row for row in group if row["metric"] == metric}
        if removed in by_removal:
            lines[_evaluated_line(warehouse, by_removal[removed], by_removal.get(()))] = None
    return tuple(lines)


def _only_removes_layers(evaluation: Mapping[str, Any]) -> bool:
    """Whether a row of ``evaluations`` is of a model that is whole but for layers, and not of a search."""
    if evaluation["task"].startswith(SEARCH):
        return False
    return all(evaluation[name] is None for name in OTHER_CHANGES)


def _evaluated_line(warehouse: Warehouse, row: Mapping[str, Any], whole: Mapping[str, Any] | None) -> str:
    """Return the result of an evaluation without layers as a sentence.

    Args:
        row: row of ``evaluations`` without the layers.
        whole: that of the whole model, if it was evaluated too.
    """
    skipped = settings_of(row).get("skip_sequences", 0)
    task = describe_task(row["task"], skipped, row["num_samples"])
    line = f"{task}: {describe_metric(row['metric'])} {shown_value(row)}"
    if whole is not None:
        line += f", {shown_value(whole)} of the whole model"
        retention = _retention(warehouse, row)
        if retention is not None:
            line += f": {retention.describe()}"
    return f"{line}."


def _retention(warehouse: Warehouse, evaluation: Mapping[str, Any]) -> Retention | None:
    """Return what is kept of a metric without the layers of an evaluation, from its cells; None without cells."""
    from avss_dist.tasks.task import Retention, combine  # torch with it

    of_run = pc.field("run_id") == evaluation["run_id"]
    of_task = pc.field("task") == evaluation["task"]
    of_metric = pc.field("metric") == evaluation["metric"]
    rows = warehouse.table("cells", where=of_run & of_task & of_metric).to_pylist()
    num_parts = len({row["part"] for row in rows})
    results = {result.intervention: result for result in combine(rows, num_parts)}
    before = results.get(InterventionKey())
    after = results.get(InterventionKey(removed=decode_removals(evaluation["drop"])))
    if before is None or after is None:
        return None
    return Retention.of(before, after)


def sparsifiable_run(warehouse: Warehouse, name: str | None) -> ChosenRun:
    """Return the newest run that measured the inputs of its linear maps.

    Args:
        name: name of the run, as for `newest_run`.
    """
    return newest_run(warehouse, name, lambda run: measured_maps(warehouse, run))


def measured_maps(warehouse: Warehouse, run: Mapping[str, Any]) -> dict[MapPlan, LayerStats]:
    """Return the linear maps of a run whose inputs were measured, as dense ones, with the statistics of their inputs.

    Args:
        run: a row of ``runs``.

    Raises:
        QueryError: if some or all inputs were not measured. The message has the command that measures them.
    """
    described = json.loads(run["projections"] or "[]")
    stats = warehouse.read_layer_stats(run["run_id"]) if described else {}
    measured: dict[MapPlan, LayerStats] = {}
    for layer, path, site, outputs, inputs in described:
        if (layer, site) not in stats:
            raise _unmeasured_inputs(warehouse, run)
        linear_map = MapPlan(
            layer=layer,
            map=path,
            site=site,
            outputs=outputs,
            inputs=inputs,
            sparsity=0.0,
            by=THRESHOLD,
            value=0.0,
        )
        measured[linear_map] = stats[layer, site]
    if measured:
        return measured
    if run.get("projections") == "[]":
        raise QueryError(
            f"No input of a linear map of {run['model']} can be seen: its maps are fused.",
            "No sparsity can be planned for it.",
        )
    raise _unmeasured_inputs(warehouse, run)


def _unmeasured_inputs(warehouse: Warehouse, run: Mapping[str, Any]) -> QueryError:
    """Return the error of a run that lacks inputs of linear maps."""
    return QueryError(
        f"Run {run['run_id']} did not measure what linear maps read.",
        f"Do: {repeated_command('score', warehouse, run, {'sites': 'inputs'})}",
    )


def map_sizes(maps: Iterable[MapPlan]) -> Float64:
    """Return the number of weights of each map, float64[maps]."""
    return np.array([linear_map.weights for linear_map in maps], np.float64)


def plan_sparsity(
    run: Mapping[str, Any],
    measured: Mapping[MapPlan, LayerStats],
    sparsities: Float64,
    by: str,
    why: Mapping[str, Any],
    seen: Iterable[SeenText] = (),
    *,
    rule: str = SPARSITY_RULES[0],
    weighted: bool = False,
) -> SparsityPlan:
    """Return a plan with a sparsity for each map.

    Args:
        run: a row of ``runs``.
        measured: the maps of the run, see `measured_maps`.
        sparsities: float64[maps].
        by: `THRESHOLD` or `TOP_K`.
        why: record of the method and its target, stored in the plan.
        seen: texts that were read.

    Raises:
        PlanError: if a top-k keeps no unit.
    """
    maps = []
    for (linear_map, read), share in zip(measured.items(), sparsities.tolist(), strict=True):
        maps.append(_sparse_map(linear_map, read, share, by))
    sizes = map_sizes(measured)
    by_map = np.array([planned.sparsity for planned in maps])
    return SparsityPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"],
        sparsity=float(by_map @ sizes / sizes.sum()),
        rule=rule,
        weighted=weighted,
        why=why,
        run_id=run["run_id"],
        findings=tuple(_fused_parts(measured, run["num_layers"])),
        seen=distinct(seen),
        projections=tuple(maps),
    )


def _sparse_map(linear_map: MapPlan, read: LayerStats, share: float, by: str) -> MapPlan:
    """Return a map with a sparsity: the threshold or the share that makes it, and the sparsity that is expected.

    Args:
        read: statistics of what the map reads.
        share: sparsity that is asked for.
        by: `THRESHOLD` or `TOP_K`.

    Raises:
        ConfigError: the map has read nothing, so that it has no threshold.
    """
    if by == TOP_K:
        value = share
        expected = int(share * linear_map.inputs) / linear_map.inputs
    elif share == 0:
        value = 0.0
        expected = read.zero_count / max(1, read.count)
    else:
        quantiles, _, _ = quantiles_of(read, [share])
        value = quantiles.item()
        expected = share
        # Where every value is counted, ties make more of them zero than are asked for.
        if not read.abs_value_cut:
            counts = read.abs_value_count
            up_to = float(counts[read.abs_value.astype(np.float64) <= value].sum())
            expected = up_to / max(float(counts.sum()), 1.0)
    return replace(linear_map, sparsity=min(expected, LARGEST_SPARSITY), by=by, value=value)


def _fused_parts(maps: Iterable[MapPlan], num_layers: int) -> Iterator[str]:
    """Yield a sentence on each part of the layers that stays dense in some of them, because its maps are fused."""
    seen_layers: dict[str, set[int]] = {}
    for linear_map in maps:
        seen_layers.setdefault(linear_map.site, set()).add(linear_map.layer)
    for site, part in (("query_input", "attention"), ("neuron", "MLP")):
        dense = num_layers - len(seen_layers.get(site, ()))
        if dense > 0:
            yield f"The {part} of {dense} of {num_layers} layers stays dense: its maps are fused."
