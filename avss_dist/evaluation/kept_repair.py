"""The repair of one plan: fitted on workers, kept in a warehouse, and found there by whoever needs it again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from avss_dist.errors import ModelError
from avss_dist.evaluation.engine import CellReporter, PlannedTask, pinned, placed
from avss_dist.evaluation.repairs import copies_of, fit_repairs, plan_fits, require_changeable
from avss_dist.executors.open import open_executor
from avss_dist.intervention import Intervention
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.layers import layer_lists
from avss_dist.models.loading import without_head
from avss_dist.models.size import load_skeleton
from avss_dist.pruning.checkpoint import require_free, require_prunable
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fitter import find_cuts
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.repair import Repair, Repaired
from avss_dist.settings import Execution, Settings
from avss_dist.warehouse.store import Store


def kept_repair(
    model: str,
    made: Plan,
    repair: Repair,
    output: Path,
    *,
    warehouse: str | Path,
    execution: Execution,
    reporter: CellReporter | None = None,
) -> Repaired:
    """The weights that repair a plan. A fit that one worker made, an experiment's too, is taken from the warehouse.

    Args:
        output: folder of the checkpoint that they are for.

    Raises:
        AvssError: a mistake, all that `pruning.checkpoint.prune` refuses among them, before anything is fitted; or the
            fit failed.
    """
    require_free(output)
    require_changeable(execution.partition)
    find_cuts(made, every_layer=REPAIRS[repair.by].every_layer)
    settings = repair.settings
    checkpoint = resolve(model, trust_remote_code=settings.trust_remote_code)
    require_prunable(checkpoint, made, settings)
    settings = replace(settings, layers=_list_path(checkpoint, made, settings))
    store = Store(warehouse)
    store.create()
    with closing(open_executor(execution, settings)) as executor:
        fixed = pinned(settings, checkpoint, executor.device)
        placement = placed(checkpoint, fixed, execution, executor)
        sharing = copies_of(placement, fixed, executor)

        def fit(copies: int) -> PlannedTask:
            return plan_fits(checkpoint, made.layers, [replace(repair, settings=fixed)], placement, copies)[repair.by]

        planned = fit(1)
        if sharing > 1 and (execution.fresh or not _is_there(planned, made.drop, store)):
            planned = fit(sharing)
        found = fit_repairs([(planned, [made.drop])], store, executor, reporter, fresh=execution.fresh)
    return found[planned.run_id(), made.drop].repaired()


def _is_there(planned: PlannedTask, drop: Sequence[int], store: Store) -> bool:
    cells = planned.cells([Intervention(removed=tuple(drop))])
    return {cell.cell_id for cell in cells} <= set(store.cell_ids(planned.run_id()))


def _list_path(checkpoint: Checkpoint, made: Plan, settings: Settings) -> str | None:
    """The path of the plan's layers; None where they are what is found without it, as in runs that name no path."""
    with suppress(ModelError):
        _, model, _ = load_skeleton(checkpoint, settings)
        if [*layer_lists(without_head(model), made.num_layers)] == [made.layers]:
            return None
    return made.layers
