"""Planning of runs, without measuring them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from avss_dist.core.settings import Execution, Settings
from avss_dist.executors.local import LocalExecutor
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import PlannedRun
from avss_dist.warehouse.store import Store


def run_spec(model: Path, *, corpus: str = "builtin:pydoc", **options: Any) -> RunSpec:
    """Return the specification of a run with options of `avss_dist.score`."""
    settings, execution = (
        cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})
        for cls in (Settings, Execution)
    )
    name = str(model)
    return RunSpec(model=name, corpus=corpus, settings=settings, execution=execution, title=name, name=name)


def plan(model: Path, warehouse: Path, **options: Any) -> PlannedRun:
    """Return the plan of a run in this process."""
    return Planner(LocalExecutor(Settings()), Store(warehouse)).prepare(run_spec(model, **options))
