"""Planning of runs, without measuring them, and the size of a model that is not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from avss_dist.core.settings import Settings
from avss_dist.evaluation.repairs import fit_plan
from avss_dist.models.checkpoint.size import Footprint
from avss_dist.partition.execution import Execution
from avss_dist.plans.plan import Plan
from avss_dist.pruning import checkpoint
from avss_dist.pruning.repair.repair import Repair, Repaired
from avss_dist.requests import PruneRequest
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.local import LocalExecutor
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.planner import Planner
from avss_dist.warehouse.store import Store


def run_spec(model: Path, *, corpus: str = "builtin:pydoc", **options: Any) -> RunSpec:
    """Return the specification of a run with options of `avss_dist.score`."""
    settings = Settings(**_options_of(Settings, options))
    execution = Execution(**_options_of(Execution, options))
    name = str(model)
    return RunSpec(model=name, corpus=corpus, settings=settings, execution=execution, title=name, name=name)


def _options_of(section: type[Settings] | type[Execution], options: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: options[field.name] for field in fields(section) if field.name in options}


def plan(model: Path, warehouse: Path, **options: Any) -> PlannedRun:
    """Return the plan of a run in this process."""
    return Planner(LocalExecutor(Settings()), Store(warehouse)).prepare(run_spec(model, **options))


def prune(
    model: str | Path, plan: Plan, output: Path, *, repair: Repair | None = None, execution: Execution | None = None
) -> dict[str, Any]:
    """Write a pruned checkpoint, with a repair that is fitted in this process."""
    fitted = repair and fit(model, plan, output, repair, execution)
    return checkpoint.prune(str(model), plan, output, repair=fitted, execution=execution)


def fit(model: str | Path, plan: Plan, output: Path, repair: Repair, execution: Execution | None = None) -> Repaired:
    """Fit a repair in this process. Nothing is written to the output."""
    request = PruneRequest(str(model), plan=plan, output=output, **vars(execution or Execution()))
    return fit_plan(request, plan, repair)


def llama_like(billions: float, layers: int = 32, hidden: int = 4096) -> Footprint:
    """A bfloat16 decoder of so many parameters."""
    parameters = int(billions * 1e9)
    layer = int(parameters * 2 * 0.95) // layers
    return Footprint(
        num_parameters=parameters,
        weight_bytes=parameters * 2,
        layer_bytes=(layer,) * layers,
        other_bytes=parameters * 2 - layer * layers,
        module_bytes=((parameters * 2 - layer * layers) // 2, *(layer,) * layers),
        num_layers=layers,
        hidden_size=hidden,
        dtype="bfloat16",
        attention="sdpa",
        num_heads=32,
        attention_width=hidden,
        attention_layers=layers,
        matmul_parameters=int(parameters * 0.95),
        mlp_width=4 * hidden,
    )
