"""Runs for which a warehouse has all that a plan needs."""

from __future__ import annotations

from avss_dist.analysis.chosen import ChosenRun, newest_run
from avss_dist.analysis.experts import require_experts
from avss_dist.analysis.ground_truth import block_distances, measured_values
from avss_dist.core.values import TableRow
from avss_dist.planning.criteria import default_score, require_scored
from avss_dist.planning.sparsity import measured_maps
from avss_dist.stats.catalog import BLOCK_DISTANCE, FROM_ACTIVATIONS, GREEDY, MEASURED
from avss_dist.warehouse.names import MEASURED_ONLY
from avss_dist.warehouse.reader import Warehouse


def plannable_run(warehouse: Warehouse, name: str | None, by: str | None, *, experts: bool = False) -> ChosenRun:
    """Return the newest run whose layers have the score, and whose scores can be read.

    Args:
        name: name of the run, as for `newest_run`.
        by: a name of ``stats.catalog.SCORES``. None selects `default_score`.
        experts: require statistics of routed experts instead.

    Raises:
        QueryError: if there is no such run.
    """

    def require(run: TableRow) -> None:
        if run["status"] != MEASURED_ONLY:
            warehouse.read_scores(run["run_id"])
        if experts:
            require_experts(warehouse, run["run_id"])
        elif by is None:
            default_score(warehouse, run)
        elif by == BLOCK_DISTANCE:
            block_distances(warehouse, run)
        elif by in MEASURED:
            measured_values(warehouse, run, by)
        elif by in FROM_ACTIVATIONS:
            require_scored(warehouse, run, by)

    return newest_run(warehouse, name, require, measured=by != GREEDY)


def sparsifiable_run(warehouse: Warehouse, name: str | None) -> ChosenRun:
    """Return the newest run that measured the inputs of its linear maps.

    Args:
        name: name of the run, as for `newest_run`.
    """
    return newest_run(warehouse, name, lambda run: measured_maps(warehouse, run))
