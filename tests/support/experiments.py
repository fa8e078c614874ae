"""Experiments of tests: a job file in a folder, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avss_dist.evaluation.experiment import run_experiment
from avss_dist.runs.job_file import read_job
from support.checkpoints import one_thread


def run_job_in(folder: Path, job: str, model: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The job file, with its warehouse beside it, and the rows of its experiment."""
    path = folder / "job.yaml"
    path.write_text(job.format(warehouse=folder / "w", model=model))
    with one_thread():
        _, rows = run_experiment(read_job(path))
    return path, rows
