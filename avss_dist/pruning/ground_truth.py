"""What evaluations in a warehouse say of the layers of a checkpoint: the truth that scores are to tell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from avss_dist.errors import QueryError
from avss_dist.settings import GROUND_TRUTH, Settings
from avss_dist.stats.layer_stats import Float64
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

_OPTIONS = {"loss": "", "shapley": " --no-leave-one-out --shapley 32", "taylor": " --no-leave-one-out --gradients"}
_REPEATED = ("max_sequences", "sequence_length", "batch_size", "layout", "dtype")


@dataclass(frozen=True, kw_only=True)
class LayerTruth:
    """What an evaluation says of each layer.

    Attributes:
        values: by layer; low is unimportant.
        run_id, task: the evaluation.
    """

    values: Mapping[int, float]
    run_id: str
    task: str

    def by_layer(self, num_layers: int) -> Float64:
        """float64[layers], NaN where nothing is known."""
        return np.array([self.values.get(layer, np.nan) for layer in range(num_layers)], np.float64)


def layer_truth(store: Warehouse, run: Mapping[str, Any], by: str) -> LayerTruth:
    """One of ``settings.GROUND_TRUTH`` for every layer of a run's checkpoint, from the newest evaluation that has it.

    ``loss`` is that without the layer less that of the whole model.

    Raises:
        QueryError: there is none; the hint is the command that measures it.
    """
    found = find_layer_truth(store, run, by)
    if found is None:
        raise QueryError(f"{store.root} has no '{by}' of the layers of {run['model']}.", ablate_command(store, run, by))
    return found


def find_layer_truth(store: Warehouse, run: Mapping[str, Any], by: str) -> LayerTruth | None:
    """As `layer_truth`; None where there is none."""
    where = (pc.field("revision") == run["revision"]) & pc.starts_with(pc.field("task"), GROUND_TRUTH[by])
    where &= pc.field("metric") == by
    rows = store.table("evaluations", where=where).to_pylist()
    evaluations = {row["run_id"]: row for row in rows}
    for newest in sorted(evaluations.values(), key=lambda row: row["created_at"], reverse=True):
        mine = [row for row in rows if row["run_id"] == newest["run_id"]]
        values = _increases(mine) if by == "loss" else {row["layer"]: row["value"] for row in mine}
        if values:
            return LayerTruth(values=values, run_id=newest["run_id"], task=newest["task"])
    return None


def ablate_command(store: Warehouse, run: Mapping[str, Any], by: str = "loss") -> str:
    """The command that measures one of ``settings.GROUND_TRUTH`` for a run's checkpoint, on the run's text."""
    hub_commit = len(run["revision"] or "") == 40
    model = f"{run['model']}@{run['revision']}" if hub_commit else run["model"]
    settings, defaults = settings_of(run), Settings().as_dict()
    changed = [
        f"--{name.replace('_', '-')} {settings[name]}"
        for name in _REPEATED
        if settings.get(name) not in (None, defaults[name])
    ]
    words = ["avss ablate", model, "--corpus", run["corpus"], "--warehouse", store.root]
    return " ".join([words[0], *map(shlex.quote, words[1:]), *changed]) + _OPTIONS[by]


def _increases(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    whole = next((row["value"] for row in rows if not row["drop"]), None)
    if whole is None:
        return {}
    return {row["drop"][0]: row["value"] - whole for row in rows if len(row["drop"]) == 1}
