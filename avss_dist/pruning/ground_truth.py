"""What evaluations in a warehouse say of the layers of a checkpoint: the truth that scores are to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from avss_dist.errors import QueryError
from avss_dist.pruning.plan import LayerTruth
from avss_dist.settings import GROUND_TRUTH
from avss_dist.warehouse.reader import Warehouse

_ASKED = {"loss": "", "shapley": " --no-leave-one-out --shapley 32", "taylor": " --no-leave-one-out --gradients"}


def layer_truth(store: Warehouse, run: Mapping[str, Any], by: str) -> LayerTruth:
    """One of ``config.GROUND_TRUTH`` for every layer of a run's checkpoint, from the newest evaluation that has it.

    ``loss`` is that without the layer less that of the whole model.

    Raises:
        QueryError: there is none.
    """
    where = (pc.field("revision") == run["revision"]) & pc.starts_with(pc.field("task"), GROUND_TRUTH[by])
    where &= pc.field("metric") == by
    rows = store.table("evaluations", where=where).to_pylist()
    found = {row["run_id"]: row for row in rows}
    for newest in sorted(found.values(), key=lambda row: row["created_at"], reverse=True):
        mine = [row for row in rows if row["run_id"] == newest["run_id"]]
        values = _increases(mine) if by == "loss" else {row["layer"]: row["value"] for row in mine}
        if values:
            return LayerTruth(values=values, run_id=newest["run_id"], task=newest["task"])
    raise QueryError(
        f"{store.root} has no '{by}' of the layers of {run['model']}.",
        f"avss ablate {run['model']} --corpus CORPUS --warehouse {store.root}{_ASKED[by]}",
    )


def _increases(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    whole = next((row["value"] for row in rows if not row["drop"]), None)
    if whole is None:
        return {}
    return {row["drop"][0]: row["value"] - whole for row in rows if len(row["drop"]) == 1}
