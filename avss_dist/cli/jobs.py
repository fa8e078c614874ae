"""Jobs on a Ray cluster: `avss jobs submit`, `list`, `logs`, `stop`; and `avss doctor`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from avss_dist.core.errors import RunFailed
from avss_dist.core.process import exit_code
from avss_dist.core.streams import console, emit, emit_json, say
from avss_dist.core.suggestions import command_line, option_words
from avss_dist.requests import ClusterRequest, DoctorRequest, ListJobsRequest, LogsRequest, StopRequest, SubmitRequest

if TYPE_CHECKING:
    from avss_dist.runs.submission import Cluster, Submitted


def doctor(_: DoctorRequest, format: str) -> int:
    """Print the result of each check. Return 1 if something does not work."""
    from avss_dist.core.doctor import check_machine

    terminal = console()
    results = []
    for result in check_machine():
        results.append(result)
        if format == "text":
            mark = "[green]ok [/]" if result.works else "[red]NO [/]"
            terminal.print(f"{mark} {result.what:<24}", end="")
            terminal.print(result.detail, markup=False)
    if format == "json":
        emit_json([asdict(result) for result in results], indent=2)
    return 0 if all(result.works for result in results) else 1


def jobs_submit(request: SubmitRequest, format: str) -> int:
    """Submit a job file and print the job's id, or its log with `follow`. Return the exit code of the job, then."""
    from avss_dist.reports.output import print_result
    from avss_dist.runs.job_file import read_job

    job_file = read_job(request.job, expand=False, watch=request.watch)
    replace(job_file.execution, **request.replaced)  # raises here the errors that the cluster would
    cluster = _cluster(request)
    job_id = cluster.submit(job_file, option_words({**request.replaced, **request.watching}))
    if not request.follow:
        print_result(format, [job_id], lambda: [{"job": job_id, "address": request.address}])
        say(f"Follow it: {_job_command('logs', job_id, request.address)} --follow")
        return 0
    say(f"Submitted {job_id}.")
    return _follow(cluster, job_id)


def jobs_list(request: ListJobsRequest, format: str) -> None:
    """Print the jobs."""
    import pyarrow as pa

    from avss_dist.reports.output import write_table

    cluster = _cluster(request)
    jobs = [cluster.job(request.job_id)] if request.job_id else cluster.jobs()
    schema = pa.schema(
        {
            "job": pa.string(),
            "status": pa.string(),
            "started": pa.string(),  # in UTC
            "seconds": pa.int64(),
            "entrypoint": pa.string(),
            "message": pa.string(),
        }
    )
    rows = [_job_row(job) for job in jobs]
    write_table(pa.Table.from_pylist(rows, schema), format, console())


def _job_row(job: Submitted) -> dict[str, str | int]:
    """Return a job as a row of the list of jobs."""
    return {
        "job": job.job_id,
        "status": job.status,
        "started": f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else "",
        "seconds": round(job.seconds),
        "entrypoint": job.entrypoint,
        "message": job.message,
    }


def jobs_logs(request: LogsRequest) -> int:
    """Print the log of a job. With `follow`, return its exit code."""
    cluster = _cluster(request)
    if request.follow:
        return _follow(cluster, request.job_id)
    emit(cluster.logs(request.job_id), end="")
    return 0


def jobs_stop(request: StopRequest, format: str) -> None:
    """Stop a job, and print the state in which it ended."""
    from avss_dist.reports.output import print_result

    outcome = _cluster(request).stop(request.job_id)
    print_result(format, [f"{request.job_id}: {outcome}"], lambda: [{"job": request.job_id, "outcome": outcome}])


def _cluster(request: ClusterRequest) -> Cluster:
    """Connect to the cluster of a request."""
    from avss_dist.runs.submission import Cluster

    return Cluster(request.address)


def _job_command(verb: str, job_id: str, address: str) -> str:
    """Return a command of `avss jobs` about a job."""
    return command_line("jobs", verb, job_id, "--address", address)


def _follow(cluster: Cluster, job_id: str) -> int:
    """Print the log until the job ends, and return its exit code."""
    try:
        for text in cluster.follow(job_id):
            emit(text, end="", flush=True)
        job = cluster.job(job_id)
    except KeyboardInterrupt:
        say(f"The job continues. Stop it: {_job_command('stop', job_id, cluster.address)}")
        return exit_code()
    except RunFailed as error:
        raise RunFailed(
            error.message,
            f"If the server is slow, the job continues: {_job_command('logs', job_id, cluster.address)} --follow\n"
            "If the cluster is lost, so is the job, not what it has stored: submit it again to resume.",
        ) from error
    line = f"{job_id}: {job.status.lower()}."
    if job.hint:
        line += f" {job.hint}"
    say(line)
    return int(job.exit_code or 0)
