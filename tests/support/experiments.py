"""Experiments of tests: a job file in a folder, run, and what they leave in a warehouse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from avss_dist.requests import RunJobRequest
from avss_dist.runs.job_file import read_job
from avss_dist.runs.result import Run
from avss_dist.studies.experiment import run_experiment
from support.checkpoints import one_thread


def experiment_of(path: Path, **execution: Any) -> tuple[list[Run], list[dict[str, Any]]]:
    """Run the experiment of a job file, and return its runs and its rows."""
    job = read_job(path)
    return run_experiment(job, RunJobRequest(job, **execution))


def run_job_in(folder: Path, job: str, model: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The job file, with its warehouse beside it, and the rows of its experiment."""
    path = folder / "job.yaml"
    path.write_text(job.format(warehouse=folder / "w", model=model))
    with one_thread():
        _, rows = experiment_of(path)
    return path, rows


def comparable(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as text that is equal for equal rows, whenever they were written; NaN equals NaN."""
    without_times = []
    for row in rows:
        without_times.append({name: value for name, value in row.items() if name != "created_at"})
    return json.dumps(without_times)


def cell_times(warehouse: str | Path) -> dict[Path, int]:
    """Return when each cell of a warehouse was written, by its file."""
    return {file: file.stat().st_mtime_ns for file in Path(warehouse, "cells").rglob("*.parquet")}
