"""Export of sparsity plans to other programs: JSON of thresholds, and a folder for TEAL."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from avss_dist.core.intervention import THRESHOLD
from avss_dist.pruning.plan import write_text
from avss_dist.pruning.selection import PlanError
from avss_dist.sparsity.plan import MapPlan, SparsityPlan

TEAL_MAPS = ("q", "k", "v", "o", "gate", "up", "down")
"""TEAL's columns, each of which is the map ``NAME_proj`` of a layer."""
TEAL_ERRORS = ("Activation Error", "Baseline Error")  # columns that TEAL writes, and does not read


def thresholds_json(plan: SparsityPlan) -> str:
    """Return a plan as JSON for other programs. ``layers[i][path]`` has the criterion of a map's zero inputs."""
    layers: dict[int, dict[str, Any]] = {}
    for entry in plan.projections:
        layers.setdefault(entry.layer, {})[entry.map] = {entry.by: entry.value, "sparsity": entry.sparsity}
    about = {name: getattr(plan, name) for name in ("model", "revision", "rule", "weighted", "sparsity")}
    return json.dumps(about | {"layers": layers}, indent=1) + "\n"


def write_teal(plan: SparsityPlan, folder: Path) -> None:
    """Write a plan as a folder for TEAL (github.com/FasterDecoding/TEAL).

    ``lookup/layer-i/results.csv`` has a row of the dense block and one of the plan, with the block's sparsity by
    weights and that of each map. TEAL takes the row whose ``Effective Sparsity`` is nearest to its target.
    ``thresholds.json`` has the thresholds, which TEAL itself would derive from its histograms.

    Raises:
        PlanError: the plan has other criteria than thresholds or maps that TEAL does not know, or a file cannot be
            written.
        StorageFull: there is no space left.
    """
    if any(entry.by != THRESHOLD for entry in plan.projections):
        raise PlanError(
            "TEAL's files are of thresholds of sizes, and this plan has others.", "Use uniform, loss or teal."
        )
    blocks: dict[int, dict[str, MapPlan]] = {}
    for entry in plan.projections:
        blocks.setdefault(entry.layer, {})[entry.map.rpartition(".")[2].removesuffix("_proj")] = entry
    for layer, maps in blocks.items():
        if sorted(maps) != sorted(TEAL_MAPS):
            names = ", ".join(entry.map for entry in maps.values())
            raise PlanError(
                f"TEAL's files are of {', '.join(TEAL_MAPS)}, and layer {layer} has {names}.",
                "Use `format` thresholds.",
            )
    for layer, maps in blocks.items():
        write_text(_in_folder(folder, f"lookup/layer-{layer}/results.csv"), _results(maps))
    write_text(_in_folder(folder, "thresholds.json"), thresholds_json(plan))


def _in_folder(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{path.parent} cannot be made: {error.strerror}.", "Name another folder.") from None
    return path


def _results(maps: dict[str, MapPlan]) -> str:
    sizes = {name: entry.outputs * entry.inputs for name, entry in maps.items()}
    whole = sum(maps[name].sparsity * size for name, size in sizes.items()) / sum(sizes.values())
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["Effective Sparsity", *TEAL_ERRORS, *TEAL_MAPS])
    lines.writerow([0.0, *("" for _ in TEAL_ERRORS), *(0.0 for _ in TEAL_MAPS)])
    lines.writerow([round(whole, 6), *("" for _ in TEAL_ERRORS), *(round(maps[n].sparsity, 6) for n in TEAL_MAPS)])
    return text.getvalue()
