"""Plans of the routed experts to drop, by what a run has measured of each."""

from __future__ import annotations

from dataclasses import replace

from avss_dist.analysis.experts import require_experts
from avss_dist.analysis.findings import expert_findings
from avss_dist.core.errors import ModelError
from avss_dist.core.values import NewObject, TableRow
from avss_dist.planning.criteria import read_layers
from avss_dist.planning.evaluated import evaluated_lines
from avss_dist.plans.choice import choose_experts
from avss_dist.plans.plan import Plan
from avss_dist.plans.run_layers import plan_removal
from avss_dist.stats.catalog import RANDOM
from avss_dist.warehouse.checks import checkpoint_name
from avss_dist.warehouse.reader import Warehouse


def plan_experts(warehouse: Warehouse, run: TableRow, by: str, share: float, seed: int) -> Plan:
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
    scores = {}
    for experts in layers:
        # A random choice goes by no score. The load has as many values as there are experts.
        scores[experts.layer] = experts.scores().get(by, experts.load)
    groups = _routing_groups(run)
    top_k = max(experts.top_k for experts in layers)
    why: NewObject = {"by": by, "experts": share}
    against = []
    if by == RANDOM:
        why["seed"] = seed
        drop = choose_experts(scores, share, top_k, groups, seed=seed)
    else:
        drop = choose_experts(scores, share, top_k, groups)
        for finding in expert_findings(warehouse, [run["run_id"]]):
            against.append(finding["message"])
    if groups > 1:
        why["groups"] = groups
    plan = plan_removal(read_layers(warehouse, run), drop, why)
    return replace(plan, findings=tuple(against), evaluated=evaluated_lines(warehouse, run, plan.drop))


def _routing_groups(run: TableRow) -> int:
    """Return the number of groups that routers divide experts into, or 1 if the configuration gives none."""
    from avss_dist.models.checkpoint.locate import find_checkpoint, read_config

    try:
        checkpoint = find_checkpoint(checkpoint_name(run))
        config = read_config(checkpoint.folder, checkpoint.name)
    except ModelError:
        return 1
    # Models of several modalities have the configuration of their text model inside.
    for part in (config, *config.values()):
        if isinstance(part, dict) and type(part.get("n_group")) is int:
            groups: int = part["n_group"]
            return groups
    return 1
