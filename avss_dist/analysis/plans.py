"""Pruning plans from a warehouse: the score to choose layers or experts by, and the findings that bear on it."""

from __future__ import annotations

import json
from collections import Counter
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
from avss_dist.core.registry import (
    BLOCK_DISTANCE,
    FROM_ACTIVATIONS,
    GREEDY,
    LOSS,
    MEASURED,
    MEASURED_ONLY,
    SCORES,
    SEARCH,
)
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_task, describe_threshold
from avss_dist.corpus.seen import SeenText, distinct
from avss_dist.pruning.ground_truth import (
    ablate_command,
    describe_headless,
    find_layer_truth,
    layer_truth,
    repeated_command,
)
from avss_dist.pruning.map_plans import MapPlan, SparsityPlan
from avss_dist.pruning.plan import Plan, make_plan, plan_of
from avss_dist.pruning.selection import (
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
from avss_dist.stats.layer_stats import Float64, LayerStats
from avss_dist.stats.rankings import depth_correlation
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import has_head, settings_of
from avss_dist.warehouse.reader import Warehouse, grouped

if TYPE_CHECKING:
    from avss_dist.tasks.task import Retention


def plan_layers(
    warehouse: Warehouse, run: Mapping[str, Any], *, by: str | None = None, reading: Reading = PUBLISHED, **options: Any
) -> Plan:
    """Return a pruning plan for the checkpoint of a run, with the warehouse's findings and evaluations of it.

    Args:
        run: a row of ``runs``.
        by: a name of ``registry.SCORES``, or of a score that people bring, see `own_score`. None selects
            `default_score`.
        reading: site, recipe, threshold and threshold kind of AVSS.
        options: the other fields of `Choice`: ``share``, ``count``, ``first``, ``last``, and so on.

    Raises:
        QueryError: if no score was named and there is no default, or the warehouse lacks the named score.
        WarehouseError: if the scores of the run are damaged.
        ConfigError: if a value is out of range.
        PlanError: if no plan satisfies the choice. See `Choice.drop` and `make_plan`.
    """
    choice = Choice(by=by or default_score(warehouse, run), reading=reading if by == "avss" else None, **options)
    if choice.by in FROM_ACTIVATIONS:
        _require_scored(warehouse, run, choice.by)
    rows: Rows
    if run.get("status") == MEASURED_ONLY:
        rows = _unscored_layers(warehouse, run)
    else:
        rows = warehouse.read_scores(run["run_id"])
    if choice.by == "avss":
        scored = sorted({_describe(reading_of(row)) for row in rows})
        rows = [row for row in rows if reading_of(row) == reading]
        if not rows:
            raise QueryError(f"No scores of {_describe(reading)}.", f"There are: {'; '.join(scored) or 'none'}.")
    truth = layer_truth(warehouse, run, choice.by) if choice.by in (*MEASURED, BLOCK_DISTANCE) else None
    if by is not None and choice.by not in SCORES:
        truth = own_score(by, warehouse, {**run, "num_layers": count_layers(rows)})
    plan, against = make_plan(rows, run, choice, truth), []
    if choice.by != BLOCK_DISTANCE:
        values = choice.scores(rows, {choice.by: truth.by_layer(plan.num_layers)} if truth else {})
        against = [*_findings(warehouse, run, choice, values.tolist())]
    return replace(plan, findings=tuple(against), evaluated=evaluated_lines(warehouse, run, plan.drop))


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
    from avss_dist.models.checkpoints import find_checkpoint
    from avss_dist.models.loading import candidate_layers
    from avss_dist.models.size import load_skeleton

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
        by: one of ``registry.EXPERT_SCORES``.
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
    random = {"seed": seed} if by == RANDOM else {}
    drop = choose_experts(scores, share, max(experts.top_k for experts in layers), groups, **random)
    why = {"by": by, "experts": share, **random, **({"groups": groups} if groups > 1 else {})}
    against = [row["message"] for row in expert_findings(warehouse, [run["run_id"]]) if by != RANDOM]
    plan = plan_of(warehouse.read_scores(run["run_id"]), run, drop, why)
    return replace(plan, findings=tuple(against), evaluated=evaluated_lines(warehouse, run, plan.drop))


def _routing_groups(run: Mapping[str, Any]) -> int:
    """Return the number of groups that routers divide experts into, or 1 if the configuration gives none."""
    from avss_dist.models.checkpoints import fetch_files, locate, read_config

    try:
        checkpoint = locate(run["model"]) or fetch_files(f"{run['model']}@{run['revision']}", ["config.json"])
        config = read_config(checkpoint.folder, checkpoint.name)
    except ModelError:
        return 1
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part["n_group"] for part in parts if type(part.get("n_group")) is int), 1)


def plannable_run(warehouse: Warehouse, name: str | None, by: str | None, *, experts: bool = False) -> ChosenRun:
    """Return the newest run whose layers have the score, and whose scores can be read.

    Args:
        name: name of the run, as for `newest_run`.
        by: a name of ``registry.SCORES``. None selects `default_score`.
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
    meanings = {name: f"  {name}: {info.meaning}" for name, info in SCORES.items()}
    if not has_head(run):
        raise QueryError(
            f"No score was named. {describe_headless(run)}",
            "\n".join(
                [
                    "Name the score to choose by with `by`:",
                    *(meanings[name] for name in (*FROM_ACTIVATIONS, LAST, RANDOM)),
                ]
            ),
        )
    raise QueryError(
        f"No score was named, and neither the damage of the layers of {run['model']} nor the loss without each is "
        "measured.",
        "\n".join(
            [
                f"Measure the damage, for about 8 passes: {ablate_command(warehouse, run, 'damage')}",
                f"Or the loss: {ablate_command(warehouse, run)}",
                "Or name the score to choose by with `by`, and evaluate the plan before you believe it:",
                *meanings.values(),
            ]
        ),
    )


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
    site, recipe, value, kind = choice.reading or PUBLISHED
    places = {(None, None), (site, None), (None, recipe), (site, recipe)} if choice.by == "avss" else {(None, None)}
    for row in findings(warehouse, [run["run_id"]], threshold=Threshold(value=value, kind=kind)).to_pylist():
        if row["kind"] != "tracks_depth" and (row["site"], row["recipe"]) in places:
            yield row["message"]
    if choice.by == "avss":
        rows = warehouse.table("experiments", run_ids=[run["run_id"]]).to_pylist()
        for experiment in newest_experiments(rows).values():
            yield from (f"{verdict} {experiment.describe()}" for verdict in verdicts(experiment.rows))


def evaluated_lines(warehouse: Warehouse, run: Mapping[str, Any], removed: Removals) -> tuple[str, ...]:
    """Return a line for each task that the model was evaluated on without these layers, beside the whole model.

    It has the rows that were read of a text, and the retention with its interval, where the cells are stored.
    """
    rows = warehouse.table("evaluations", where=pc.field("revision") == run["revision"]).to_pylist()
    other_changes = ("layer", "patch", "sparsity_plan", "factor", "rounding")
    unchanged = (
        row for row in rows if not row["task"].startswith(SEARCH) and all(row[name] is None for name in other_changes)
    )
    lines = []
    for (run_id, task), group in grouped(unchanged, itemgetter("run_id", "task")).items():
        metric = primary_metric(group)
        by_removal = {decode_removals(row["drop"]): row for row in group if row["metric"] == metric}
        if removed not in by_removal:
            continue
        row = by_removal[removed]
        read = describe_task(task, settings_of(row).get("skip_sequences", 0), row["num_samples"])
        line = f"{read}: {describe_metric(metric)} {shown_value(row)}"
        if () in by_removal:
            line += f", {shown_value(by_removal[()])} of the whole model"
            if (retention := _retention(warehouse, run_id, task, metric, removed)) is not None:
                line += f": {retention.describe()}"
        lines.append(f"{line}.")
    return tuple(dict.fromkeys(lines))


def _retention(warehouse: Warehouse, run_id: str, task: str, metric: str, removed: Removals) -> Retention | None:
    """Return what is kept of a metric without these layers, from the cells of an evaluation; None without cells."""
    from avss_dist.tasks.task import Retention, combine  # torch with it

    where = (pc.field("run_id") == run_id) & (pc.field("task") == task) & (pc.field("metric") == metric)
    rows = warehouse.table("cells", where=where).to_pylist()
    results = {result.intervention: result for result in combine(rows, len({row["part"] for row in rows}))}
    before, after = results.get(InterventionKey()), results.get(InterventionKey(removed=removed))
    return Retention.of(before, after) if before and after else None


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
    if not described or any((layer, site) not in stats for layer, _, site, _, _ in described):
        if run.get("projections") == "[]":
            raise QueryError(
                f"No input of a linear map of {run['model']} can be seen: its maps are fused.",
                "No sparsity can be planned for it.",
            )
        raise QueryError(
            f"Run {run['run_id']} did not measure what linear maps read.",
            f"Do: {repeated_command('score', warehouse, run, {'sites': 'inputs'})}",
        )
    dense: dict[str, Any] = {"sparsity": 0.0, "by": THRESHOLD, "value": 0.0}
    return {
        MapPlan(layer=layer, map=path, site=site, outputs=outputs, inputs=inputs, **dense): stats[layer, site]
        for layer, path, site, outputs, inputs in described
    }


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
        value, expected = share, int(share * linear_map.inputs) / linear_map.inputs
        if by != TOP_K:
            value, counts = quantiles_of(read, [share])[0].item(), read.abs_value_count
            up_to = float(counts[read.abs_value.astype(np.float64) <= value].sum())
            expected = share if read.abs_value_cut else up_to / max(float(counts.sum()), 1.0)
            if share == 0:
                value, expected = 0.0, read.zero_count / max(1, read.count)
        maps.append(replace(linear_map, sparsity=min(expected, 1 - 1e-9), by=by, value=value))
    number = run["num_layers"]
    layers = Counter(site for site, _ in {(linear_map.site, linear_map.layer) for linear_map in measured})
    findings = [
        f"The {what} of {number - layers[site]} of {number} layers stays dense: its maps are fused."
        for site, what in (("query_input", "attention"), ("neuron", "MLP"))
        if layers[site] < number
    ]
    by_map, sizes = np.array([planned.sparsity for planned in maps]), map_sizes(measured)
    return SparsityPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=number,
        sparsity=float(by_map @ sizes / sizes.sum()),
        rule=rule,
        weighted=weighted,
        why=why,
        run_id=run["run_id"],
        findings=tuple(findings),
        seen=distinct(seen),
        projections=tuple(maps),
    )
