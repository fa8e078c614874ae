"""Values of a criterion for the layers of a run's checkpoint, wherever a warehouse or a user has them."""

from __future__ import annotations

from avss_dist.analysis.contrast import Strata
from avss_dist.analysis.ground_truth import block_distances, find_measured_values, measured_values
from avss_dist.analysis.next_commands import ablate_command, describe_headless, repeated_command
from avss_dist.analysis.own_scores import own_score
from avss_dist.core.errors import QueryError
from avss_dist.core.settings import Settings
from avss_dist.core.thresholds import describe_threshold
from avss_dist.core.values import TableRow
from avss_dist.plans.criteria import (
    LEAVE_ONE_OUT,
    Criterion,
    CriterionValues,
    LayerValues,
    Reading,
    Rows,
    random_values,
    reading_of,
    stored_values,
    values_from_the_end,
)
from avss_dist.plans.run_layers import RunLayers
from avss_dist.stats.catalog import BLOCK_DISTANCE, CONTRAST, FROM_ACTIVATIONS, LAST, MEASURED, RANDOM, SCORES
from avss_dist.stats.contrast import contrast
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import has_head, settings_of
from avss_dist.warehouse.names import MEASURED_ONLY
from avss_dist.warehouse.reader import Warehouse


def read_layers(warehouse: Warehouse, run: TableRow) -> RunLayers:
    """Return the layers of the checkpoint of a run, with their scores if it was scored.

    Args:
        run: a row of ``runs``.

    Raises:
        QueryError: the checkpoint was not scored, and its layers are not known without scores.
        WarehouseError: the scores of the run are damaged.
    """
    if run.get("status") == MEASURED_ONLY:
        return RunLayers(run=run, rows=_unscored_layers(warehouse, run))
    return RunLayers(run=run, rows=warehouse.read_scores(run["run_id"]))


def _unscored_layers(warehouse: Warehouse, run: TableRow) -> Rows:
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
    rows = []
    for index in range(len(modules)):
        rows.append({"layer": index, "layer_name": f"{path}.{index}"})
    return rows


def criterion_values(warehouse: Warehouse, layers: RunLayers, criterion: Criterion) -> CriterionValues:
    """Return the values of a criterion for the layers of a run's checkpoint.

    A greedy search has none: it measures sets of layers.

    Raises:
        QueryError: the warehouse or the user's own score lacks values of these layers.
    """
    by = criterion.by
    if by == RANDOM:
        return random_values(layers.number, criterion.seed)
    if by == LAST:
        return values_from_the_end(layers.number)
    if by == BLOCK_DISTANCE:
        return block_distances(warehouse, layers.run)
    if by in MEASURED:
        return measured_values(warehouse, layers.run, by)
    if by == CONTRAST:
        return _negative_contrasts(warehouse, layers, criterion)
    if by in FROM_ACTIVATIONS:
        require_scored(warehouse, layers.run, by)
        if criterion.reading is not None:
            _require_reading(layers.rows, criterion.reading)
        return stored_values(layers.rows, by, criterion.reading)
    return own_score(by, warehouse, {**layers.run, "num_layers": layers.number})


def require_scored(warehouse: Warehouse, run: TableRow, by: str) -> None:
    """Raise QueryError if a checkpoint was not scored, and lacks a score of activations."""
    if run.get("status") == MEASURED_ONLY:
        raise QueryError(
            f"{run['model']} was not scored, and `by` {by} is a score.",
            f"Do: {repeated_command('score', warehouse, run)}",
        )


def _require_reading(rows: Rows, reading: Reading) -> None:
    """Raise QueryError if rows of ``scores`` lack a reading of AVSS. The message has the readings that there are."""
    readings = {reading_of(row) for row in rows}
    if reading not in readings:
        scored = sorted({_describe_reading(stored) for stored in readings})
        raise QueryError(f"No scores of {_describe_reading(reading)}.", f"There are: {'; '.join(scored) or 'none'}.")


def _describe_reading(reading: Reading) -> str:
    site, recipe, threshold, kind = reading
    return f"site {site}, recipe {recipe}, threshold {describe_threshold(threshold, kind)}"


def _negative_contrasts(warehouse: Warehouse, layers: RunLayers, criterion: Criterion) -> LayerValues:
    """Return the contrast of every layer with its sign changed, so that layers of the highest contrast are dropped."""
    assert criterion.reading is not None
    site, recipe, threshold, kind = criterion.reading
    strata = Strata.of_run(warehouse, layers.run, site)
    (contrasts,) = contrast(*strata.both_sides(recipe, Threshold(value=threshold, kind=kind)))
    return LayerValues(values=dict(zip(strata.layers, (-contrasts).tolist(), strict=True)))


def default_score(warehouse: Warehouse, run: TableRow) -> str:
    """Return the default score to choose layers by: the measured loss, else its estimate, the damage.

    Scores from activations are never the default, because an experiment may refute them for this model.

    Raises:
        QueryError: if neither is measured. The message has the commands that measure them, and the other scores.
    """
    for name in (LEAVE_ONE_OUT, "damage"):
        if find_measured_values(warehouse, run, name):
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
