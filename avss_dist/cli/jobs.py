"""`avss run`, and jobs on a Ray cluster: `avss submit`, `status`, `logs`, `stop`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.base import console, say, spelled
from avss_dist.errors import ConfigError, require_known
from avss_dist.settings import EXECUTORS

if TYPE_CHECKING:
    from avss_dist.runs.api import Run
    from avss_dist.runs.job_file import JobFile

JobPath = Annotated[str, typer.Argument(metavar="JOB.yaml", help="A job file; jobs/README.md explains its keys.")]
JobId = Annotated[str, typer.Argument(help="What avss submit printed, and avss status lists.")]
Head = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server: http://HEAD:8265.")]
ReplicasOption = Annotated[int | None, typer.Option(help="Model copies that work in parallel.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Measure again what is done already.")]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Print the log until the job ends.")]


def run(
    job: JobPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    executor: Annotated[str | None, typer.Option(help="auto, local (this process), ray.")] = None,
    replicas: ReplicasOption = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; RAY_ADDRESS otherwise.")] = None,
    fresh: FreshOption = False,
) -> int:
    """Run what a job file asks for: what is done is skipped, what broke off is resumed, what fails is recorded."""
    if executor is not None:
        require_known("executor", executor, EXECUTORS)
    given = {"executor": executor, "replicas": replicas, "address": address, "fresh": fresh or None}
    options = {name: value for name, value in given.items() if value is not None}

    from avss_dist.runs.job_file import read_job

    read = read_job(job)
    return _preview(read, options) if dry_run else _run(read, options)


def _preview(job: JobFile, options: dict[str, Any]) -> int:
    from avss_dist.report.terminal.plan import plan_table
    from avss_dist.runs.api import preview_job

    previews = preview_job(job, **options)
    console().print(plan_table(previews, job.warehouse))
    return 1 if any(preview.status == "refused" for preview in previews) else 0


def _run(job: JobFile, options: dict[str, Any]) -> int:
    from avss_dist.report.terminal.progress import Log, Progress
    from avss_dist.runs.api import run_job

    with Progress() if sys.stderr.isatty() else Log(len(job.specs)) as reporter:
        runs = run_job(job, reporter=reporter, **options)
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        print(f"{run.run_id}: failed. {spelled(str(run.error))}")
    print(_summary(runs))
    return 1 if failed else 0


def _summary(runs: list[Run]) -> str:
    count = {status: sum(run.status == status for run in runs) for status in ("done", "skipped", "failed")}
    told = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    warehouse = runs[0].warehouse
    return f"{len(runs)} runs: {told}. Look at them: avss query {warehouse} 'SELECT run_id, model, status FROM runs'"


def require_experiment(job: JobFile) -> None:
    """Refuse a job file without a section for an experiment."""
    if job.experiment is None:
        raise ConfigError(f"{job.path} has no section 'experiment'.", "jobs/README.md shows one.")


def submit(
    job: JobPath,
    address: Head,
    replicas: ReplicasOption = None,
    experiment: Annotated[bool, typer.Option("--experiment", help="Have avss experiment take it.")] = False,
    fresh: FreshOption = False,
    follow: FollowOption = False,
) -> int:
    """Submit a job file to a Ray cluster, where avss run takes it; the cluster needs avss_dist and the models."""
    from avss_dist.runs.job_file import read_job
    from avss_dist.runs.submission import Cluster

    read = read_job(job, expand=False)
    if experiment:
        require_experiment(read)
    options = ([f"--replicas={replicas}"] if replicas else []) + (["--fresh"] if fresh else [])
    cluster = Cluster(address)
    job_id = cluster.submit(read, options, experiment=experiment)
    if not follow:
        print(job_id)
        say(f"Follow it: avss logs {job_id} --address {address} --follow")
        return 0
    say(f"Submitted {job_id}.")
    return _follow(cluster, job_id, address)


def status(
    address: Head, job_id: Annotated[str | None, typer.Argument(help="One job; all of them if left out.")] = None
) -> int:
    """Say how submitted jobs stand."""
    from avss_dist.report.terminal.scores import plain_table
    from avss_dist.runs.submission import Cluster

    cluster = Cluster(address)
    jobs = [cluster.job(job_id)] if job_id else cluster.jobs()
    columns = ("job", "status", "started (UTC)", "seconds", "entrypoint", "message")
    console().print(plain_table(columns, [job.row() for job in jobs]))
    return 0


def logs(job_id: JobId, address: Head, follow: FollowOption = False) -> int:
    """Print the log of a submitted job."""
    from avss_dist.runs.submission import Cluster

    cluster = Cluster(address)
    if follow:
        return _follow(cluster, job_id, address)
    print(cluster.logs(job_id), end="")
    return 0


def stop(job_id: JobId, address: Head) -> int:
    """Stop a submitted job; what it measured is kept, and submitting it again goes on from there."""
    from avss_dist.runs.submission import Cluster

    print(f"{job_id}: {Cluster(address).stop(job_id)}")
    return 0


def _follow(cluster: Any, job_id: str, address: str) -> int:
    """Print the log until the job ends; its exit code."""
    try:
        for text in cluster.follow(job_id):
            print(text, end="", flush=True)
        job = cluster.wait(job_id)
    except KeyboardInterrupt:
        say(f"The job goes on. Stop it: avss stop {job_id} --address {address}")
        return 130
    say(f"{job_id}: {job.status.lower()}." + (f" {job.hint}" if job.hint else ""))
    return int(job.exit_code)
