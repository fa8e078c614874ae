"""`avss run`, and jobs on a Ray cluster: `avss submit`, `status`, `logs`, `stop`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.base import spelled
from avss_dist.cli.options import WORKERS, takes_settings
from avss_dist.errors import ConfigError
from avss_dist.settings import ANSWER_SECONDS, CONNECT_SECONDS
from avss_dist.system.streams import console, emit, emit_json, say

if TYPE_CHECKING:
    from avss_dist.runs.api import Run
    from avss_dist.runs.job_file import JobFile
    from avss_dist.runs.submission import Cluster

JobPath = Annotated[str, typer.Argument(metavar="JOB.yaml", help="A job file; docs/job-files.md explains its keys.")]
JobId = Annotated[str, typer.Argument(help="What avss submit printed, and avss status lists.")]
Head = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server: http://HEAD:8265.")]
ConnectOption = Annotated[float, typer.Option(help="How long the job server may take to connect.", min=0.01)]
AnswerOption = Annotated[float, typer.Option(help="How long it may send nothing while it answers.", min=0.01)]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Print the log until the job ends.")]


def _print_schema(wanted: bool) -> None:
    if wanted:
        from avss_dist.runs.job_file import job_schema

        emit_json(job_schema(), indent=2)
        raise typer.Exit


@takes_settings(*WORKERS, overrides=True)
def run(
    job: JobPath,
    _schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of job files, for editors."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    **options: Any,
) -> int:
    """Run what a job file asks for: what is done is skipped, what broke off is resumed, what fails is recorded."""
    from avss_dist.runs.job_file import read_job

    read = read_job(job)
    return _preview(read, options) if dry_run else _run(read, options)


def _preview(job: JobFile, options: dict[str, Any]) -> int:
    from avss_dist.estimate.preview import preview_job
    from avss_dist.report.terminal.plan import plan_table
    from avss_dist.runs.reporter import Reporter

    class Announcer(Reporter):
        def planning(self, name: str) -> None:
            say(f"Planning {name} ...")

    previews = preview_job(job, reporter=Announcer(), **options)
    console().print(plan_table(previews, job.warehouse))
    return 1 if any(preview.status == "refused" for preview in previews) else 0


def _run(job: JobFile, options: dict[str, Any]) -> int:
    from avss_dist.report.terminal.progress import Log, Progress
    from avss_dist.runs.api import run_job

    with Progress() if sys.stderr.isatty() else Log(len(job.specs)) as reporter:
        runs = run_job(job, reporter=reporter, **options)
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        emit(f"{run.run_id}: failed. {spelled(str(run.error))}")
    emit(_summary(runs))
    return 1 if failed else 0


def _summary(runs: list[Run]) -> str:
    count = {status: sum(run.status == status for run in runs) for status in ("done", "skipped", "failed")}
    counts = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    warehouse = runs[0].warehouse
    return f"{len(runs)} runs: {counts}. Look at them: avss query {warehouse} 'SELECT run_id, model, status FROM runs'"


def require_experiment(job: JobFile) -> None:
    """Refuse a job file without a section for an experiment."""
    if job.experiment is None:
        raise ConfigError(f"{job.path} has no section 'experiment'.", "docs/job-files.md shows one.")


@takes_settings("replicas", "fresh", overrides=True)
def submit(
    job: JobPath,
    address: Head,
    experiment: Annotated[bool, typer.Option("--experiment", help="Have avss experiment take it.")] = False,
    follow: FollowOption = False,
    connect_seconds: ConnectOption = CONNECT_SECONDS,
    answer_seconds: AnswerOption = ANSWER_SECONDS,
    **options: Any,
) -> int:
    """Submit a job file to a Ray cluster, where avss run takes it; the cluster needs avss_dist and the models."""
    from avss_dist.runs.job_file import read_job

    read = read_job(job, expand=False)
    if experiment:
        require_experiment(read)
    replace(read.execution, **options)  # refuses here what the cluster would
    taken = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    cluster = _cluster(address, connect_seconds, answer_seconds)
    job_id = cluster.submit(read, taken, experiment=experiment)
    if not follow:
        emit(job_id)
        say(f"Follow it: avss logs {job_id} --address {address} --follow")
        return 0
    say(f"Submitted {job_id}.")
    return _follow(cluster, job_id, address)


def status(
    address: Head,
    job_id: Annotated[str | None, typer.Argument(help="One job; all of them if left out.")] = None,
    connect_seconds: ConnectOption = CONNECT_SECONDS,
    answer_seconds: AnswerOption = ANSWER_SECONDS,
) -> int:
    """Say how submitted jobs stand."""
    from avss_dist.report.terminal.tables import plain_table

    cluster = _cluster(address, connect_seconds, answer_seconds)
    jobs = [cluster.job(job_id)] if job_id else cluster.jobs()
    columns = ("job", "status", "started (UTC)", "seconds", "entrypoint", "message")
    console().print(plain_table(columns, [job.row() for job in jobs]))
    return 0


def logs(
    job_id: JobId,
    address: Head,
    follow: FollowOption = False,
    connect_seconds: ConnectOption = CONNECT_SECONDS,
    answer_seconds: AnswerOption = ANSWER_SECONDS,
) -> int:
    """Print the log of a submitted job."""
    cluster = _cluster(address, connect_seconds, answer_seconds)
    if follow:
        return _follow(cluster, job_id, address)
    emit(cluster.logs(job_id), end="")
    return 0


def stop(
    job_id: JobId,
    address: Head,
    connect_seconds: ConnectOption = CONNECT_SECONDS,
    answer_seconds: AnswerOption = ANSWER_SECONDS,
) -> int:
    """Stop a submitted job; what it measured is kept, and submitting it again goes on from there."""
    cluster = _cluster(address, connect_seconds, answer_seconds)
    emit(f"{job_id}: {cluster.stop(job_id)}")
    return 0


def _cluster(address: str, connect_seconds: float, answer_seconds: float) -> Cluster:
    from avss_dist.runs.submission import Cluster

    return Cluster(address, connect_seconds=connect_seconds, answer_seconds=answer_seconds)


def _follow(cluster: Any, job_id: str, address: str) -> int:
    """Print the log until the job ends; its exit code."""
    try:
        for text in cluster.follow(job_id):
            emit(text, end="", flush=True)
        job = cluster.wait(job_id)
    except KeyboardInterrupt:
        say(f"The job goes on. Stop it: avss stop {job_id} --address {address}")
        return 130
    say(f"{job_id}: {job.status.lower()}." + (f" {job.hint}" if job.hint else ""))
    return int(job.exit_code)
