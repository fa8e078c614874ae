"""Jobs on a Ray cluster: `avss jobs submit`, `list`, `logs`, `stop`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.base import HELP, Group
from avss_dist.cli.commands import epilog
from avss_dist.cli.options import FORMATS, TEXT_FORMATS, FormatOption, TextFormatOption, takes_output, takes_settings
from avss_dist.cli.run import JobPath
from avss_dist.core.settings import ANSWER_SECONDS, CONNECT_SECONDS
from avss_dist.system.signals import exit_code
from avss_dist.system.streams import console, emit, emit_json, say

if TYPE_CHECKING:
    from avss_dist.runs.submission import Cluster

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="Id of the job, from avss jobs list.")]
Head = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server: http://HEAD:8265.")]
ConnectOption = Annotated[float, typer.Option(help="Seconds to wait for a connection to the job server.", min=0.01)]
AnswerOption = Annotated[float, typer.Option(help="Seconds to wait for its answer.", min=0.01)]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Print the log until the job ends.")]


@takes_settings("replicas", "fresh")
def submit(
    job: JobPath,
    address: Head,
    follow: FollowOption = False,
    connect_seconds: ConnectOption = CONNECT_SECONDS,
    answer_seconds: AnswerOption = ANSWER_SECONDS,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> int:
    """Submit a job file to a Ray cluster, which runs it with avss run; it needs avss_dist and the models."""
    from avss_dist.runs.job_file import read_job

    job_file = read_job(job, expand=False)
    replace(job_file.execution, **options)  # raises here the errors that the cluster would
    arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    cluster = _cluster(address, connect_seconds, answer_seconds)
    job_id = cluster.submit(job_file, arguments)
    if not follow:
        if format == "json":
            emit_json({"job": job_id, "address": address})
        else:
            emit(job_id)
        say(f"Follow it: avss jobs logs {job_id} --address {address} --follow")
        return 0
    say(f"Submitted {job_id}.")
    return _follow(cluster, job_id, address)


def list_(
    address: Head,
    job_id: Annotated[str | None, typer.Argument(metavar="JOB_ID", help="A job; all jobs by default.")] = None,
    connect_seconds: ConnectOption = CONNECT_SECONDS,
    answer_seconds: AnswerOption = ANSWER_SECONDS,
    format: FormatOption = FORMATS[0],
) -> int:
    """List submitted jobs and their status."""
    import pyarrow as pa

    from avss_dist.report.output import write_table
    from avss_dist.runs.submission import COLUMNS

    cluster = _cluster(address, connect_seconds, answer_seconds)
    jobs = [cluster.job(job_id)] if job_id else cluster.jobs()
    rows = [dict(zip(COLUMNS, job.row(), strict=True)) for job in jobs]
    types = {"seconds": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
    write_table(pa.Table.from_pylist(rows, schema), format, console())
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
    format: TextFormatOption = TEXT_FORMATS[0],
) -> int:
    """Stop a submitted job; its measurements are kept, and submitting it again resumes it."""
    cluster = _cluster(address, connect_seconds, answer_seconds)
    outcome = cluster.stop(job_id)
    if format == "json":
        emit_json({"job": job_id, "outcome": outcome})
    else:
        emit(f"{job_id}: {outcome}")
    return 0


def _cluster(address: str, connect_seconds: float, answer_seconds: float) -> Cluster:
    from avss_dist.runs.submission import Cluster

    return Cluster(address, connect_seconds=connect_seconds, answer_seconds=answer_seconds)


def _follow(cluster: Any, job_id: str, address: str) -> int:
    """Print the log until the job ends, and return its exit code."""
    try:
        for text in cluster.follow(job_id):
            emit(text, end="", flush=True)
        job = cluster.wait(job_id)
    except KeyboardInterrupt as stop:
        say(f"The job continues. Stop it: avss jobs stop {job_id} --address {address}")
        return exit_code(stop)
    say(f"{job_id}: {job.status.lower()}." + (f" {job.hint}" if job.hint else ""))
    return int(job.exit_code)


jobs = typer.Typer(
    cls=Group,
    help="Jobs on a Ray cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=HELP,
    add_completion=False,
)
_COMMANDS: dict[str, Callable[..., Any]] = {"submit": submit, "list": list_, "logs": logs, "stop": stop}
for _name, _command in _COMMANDS.items():
    jobs.command(_name, epilog=epilog(f"jobs {_name}"))(takes_output(_command))
