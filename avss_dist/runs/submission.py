"""Jobs on a Ray cluster: submit a job file, follow it, stop it, through the cluster's job server."""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss_dist.core.errors import AvssError, ConfigError, RunFailed, without_secrets
from avss_dist.core.process import UMASK, current_umask
from avss_dist.core.suggestions import command_line
from avss_dist.corpus.seen import SELF
from avss_dist.corpus.sources import local_files
from avss_dist.pruning.repair.registry import split_weight
from avss_dist.runs.job_file import JobFile
from avss_dist.tasks.harness_files import task_files

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

TOKEN_HINT = (
    "Give this machine the cluster's token: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token; "
    "`ray get-auth-token` on the head prints it."
)
STATE_SECONDS = 1.0  # between two requests for a state or a log
STOP_SECONDS = 60.0  # for a job to end after it was stopped: Ray kills it after a few
MOST_BYTES = 50_000_000  # of local files that travel with a job
SEND_ALL = ["!*"]  # Ray leaves out folders named venv, .git and the like; these are only the files that a job names
NO_COMMAND = (
    "The cluster's image has no avss_dist: install it on every node, from a clone or a wheel of the repository."
)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A submitted job.

    Attributes:
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        started: start time in UTC.
        seconds: time since the start, or until the end.
        message: reason of a failure: the first error in the log, or the job server's message.
        exit_code: exit code of the command: 0 done, 1 a run failed or was stopped, 2 a mistake; None before its end.
        hint: what to do next; may be empty.
    """

    job_id: str
    status: str
    started: datetime | None
    seconds: float
    entrypoint: str
    message: str
    exit_code: int | None
    hint: str = ""


class Cluster:
    """The job server of a Ray cluster.

    Args:
        address: ``http://HEAD:8265``.

    Raises:
        ConfigError: no server answers, or it refuses the token. Methods raise it too.
        RunFailed: the server does not answer in time. Methods raise it too.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"'{address}' is not the address of a job server.", "Write http://HEAD:8265.")
        with _environment_of_client():
            from ray.job_submission import JobSubmissionClient
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("ray")]:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.address = address
        limits = (_seconds("AVSS_CONNECT_SECONDS", 10.0), _seconds("AVSS_ANSWER_SECONDS", 60.0))

        class Client(JobSubmissionClient):
            """Client that waits at most for the time limits, to connect and for each piece of an answer."""

            def _do_request(self, method: str, endpoint: str, *, data: Any = None, **options: Any) -> Any:
                body: Any = data and io.BytesIO(data)  # sent in blocks: the limit is for each, not for the whole file
                options["timeout"] = limits
                return super()._do_request(method, endpoint, data=body, **options)

        with self._explained(), _environment_of_client():
            self._client = Client(address)

    def submit(self, job: JobFile, options: Sequence[str] = ()) -> str:
        """Start ``avss run`` on the cluster with a copy of the job file, and return the job id.

        Local files that the job names by relative paths are sent along: texts, task files and their data. The job
        writes files with the rights that the umask of this process leaves them.

        Raises:
            ConfigError: the job names a path that will not exist on the cluster.
        """
        _require_reachable(job)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.path.stem).strip("-.") or "job"  # for a URL and a shell
        job_id = f"avss-{name}-{secrets.token_hex(3)}"
        with tempfile.TemporaryDirectory() as folder:
            directory, name = _pack(job, Path(folder))
            environment = {
                "working_dir": folder,
                "excludes": SEND_ALL,
                "env_vars": {UMASK: f"{current_umask():03o}"},
            }
            metadata = {"avss_warehouse": without_secrets(job.warehouse), "avss_runs": str(len(job.specs))}
            try:
                with self._explained():
                    submitted_id = self._client.submit_job(
                        entrypoint=_entrypoint(directory, name, options),
                        submission_id=job_id,
                        runtime_env=environment,
                        metadata=metadata,
                    )
                    return str(submitted_id)
            except RunFailed as error:  # the server may have the request, and its answer was lost
                raise RunFailed(
                    error.message,
                    f"The job may have started as {job_id}. Before you submit it again: {self._list_command()}",
                ) from error

    def job(self, job_id: str) -> Submitted:
        """Return a job."""
        with self._explained(job_id):
            return _submitted(self._client.get_job_info(job_id))

    def jobs(self) -> list[Submitted]:
        """Return every job that was submitted, the oldest first."""
        with self._explained():
            jobs = [_submitted(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or datetime.now(UTC))

    def logs(self, job_id: str) -> str:
        """Return the log of a job."""
        with self._explained(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """Yield the output of a job as it is printed, until the job ends."""
        printed = 0
        while True:
            job = self.job(job_id)
            log = self.logs(job_id)
            yield log[printed:]
            printed = len(log)
            if job.exit_code is not None:
                return
            time.sleep(STATE_SECONDS)

    def stop(self, job_id: str) -> str:
        """Stop a job, wait for its end for up to a minute, and return its state as a sentence."""
        with self._explained(job_id):
            if not self._client.stop_job(job_id):
                return f"it has ended already ({self.job(job_id).status.lower()})."
            deadline = time.monotonic() + STOP_SECONDS
            job = self.job(job_id)
            while job.exit_code is None and time.monotonic() < deadline:
                time.sleep(STATE_SECONDS)
                job = self.job(job_id)
            if job.exit_code is None:
                return "it was signalled, and has not ended."
            return f"{job.status.lower()}."

    def _list_command(self) -> str:
        return command_line("jobs", "list", "--address", self.address)

    @contextmanager
    def _explained(self, job_id: str = "") -> Iterator[None]:
        """Convert Ray's exceptions in the block to an AvssError with a hint."""
        from ray.exceptions import AuthenticationError
        from requests.exceptions import ConnectionError as NoAnswer
        from requests.exceptions import Timeout

        try:
            yield
        except AvssError:
            raise
        except (NoAnswer, Timeout) as error:  # `requests` raises either when a server stops answering
            raise RunFailed(
                f"The job server at {self.address} closed the connection or did not answer in time.",
                "Check the address. A slow server needs larger AVSS_CONNECT_SECONDS or AVSS_ANSWER_SECONDS.",
            ) from error
        except AuthenticationError as error:
            refused = "refuses this token" if _has_token() else "requires a token"
            raise ConfigError(f"The job server at {self.address} {refused}.", TOKEN_HINT) from error
        except ConnectionError as error:
            raise ConfigError(
                f"No job server answers at {self.address}.",
                "Check the address (the dashboard's, port 8265), and that the cluster is up: ray status on its head.",
            ) from error
        except Exception as error:  # the server may be no job server, or one of another version
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            if job_id and ("404" in text or "does not exist" in str(error)):
                raise ConfigError(
                    f"{self.address} has no job '{job_id}'.",
                    f"{self._list_command()} lists its jobs.",
                ) from error
            raise RunFailed(
                f"The job server at {self.address} failed: {text}",
                "If this persists, check that the cluster runs this version of Ray.",
            ) from error


@contextmanager
def _environment_of_client() -> Iterator[None]:
    """Hide, inside the block, variables that Ray prefers to the given address, and use a token if there is one."""
    before = dict(os.environ)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once, when it is imported
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _seconds(variable: str, default: float) -> float:
    """Return the number of seconds in an environment variable."""
    text = os.environ.get(variable, "")
    try:
        return float(text or default)
    except ValueError as error:
        raise ConfigError(f"{variable} is '{text}': expected a number of seconds.") from error


def _has_token() -> bool:
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(token) or (Path.home() / ".ray" / "auth_token").is_file()


def _submitted(details: JobDetails) -> Submitted:
    """Return a job as the job server describes it."""
    started = None
    seconds = 0.0
    if details.start_time:
        start = details.start_time / 1000
        end = details.end_time / 1000 if details.end_time else time.time()
        started = datetime.fromtimestamp(start, UTC)
        seconds = max(0.0, end - start)  # the cluster's clock may be ahead
    code = getattr(details, "driver_exit_code", None)
    if not details.status.is_terminal():
        exit_code = None
    elif details.status.value == "SUCCEEDED":
        exit_code = 0
    else:
        exit_code = code if code in (1, 2) else 1
    return Submitted(
        job_id=str(details.submission_id or details.job_id),
        status=str(details.status.value),
        started=started,
        seconds=seconds,
        entrypoint=details.entrypoint,
        message=_outcome(details.message or ""),
        exit_code=exit_code,
        hint=NO_COMMAND if code == 127 else "",  # of a shell
    )


def _outcome(log: str) -> str:
    """Return the first line of a log that tells of an error or of a failed run, or else its first line."""
    error = re.search(r"^Error: (.*)$", log, re.MULTILINE)
    if error is None:
        error = re.search(r"^(\S+: failed\. .*)$", log, re.MULTILINE)
    line = error[1] if error else log.strip().partition("\n")[0]
    return line.strip()


def _require_reachable(job: JobFile) -> None:
    """Raise ConfigError for paths that are not in the working directory that the cluster makes."""
    problems = []
    if "://" not in job.warehouse and not os.path.isabs(os.path.expanduser(job.warehouse)):
        problems.append(f"the warehouse '{job.warehouse}' would be lost with the job's working directory")
    for model, line in job.models.items():
        path = Path(model)
        if path.is_absolute():
            continue
        if path.is_dir() or path.is_file() or model.startswith(".") or "*" in model:
            problems.append(f"line {line}: the model '{model}' is a relative path")
    if problems:
        raise ConfigError(
            f"{job.path} cannot be submitted: {'; '.join(problems)}.",
            "Write absolute paths that exist on the cluster (a shared disk), hub ids, or an s3:// or gs:// warehouse.",
        )


def _local_files(job: JobFile) -> list[str]:
    """Return the files that a job names by relative paths, sorted: texts, task files and their data.

    Raises:
        ConfigError: a file is missing or cannot be read, or together they are too large.
    """
    files: set[str] = set()
    problems: list[str] = []

    def add_files(find: Callable[[str], list[str]], name: str, where: str) -> None:
        try:
            files.update(find(name))
        except AvssError as error:
            problems.append(f"{where}: {error}".replace("\n", " "))

    for text, line in job.corpora.items():
        add_files(local_files, text, f"line {line}")
    if job.experiment:
        for weighted_text in job.experiment.repair_corpora:
            name = split_weight(weighted_text)[0]
            if name != SELF:
                add_files(local_files, name, "repair_corpora")
        for task in job.experiment.tasks:
            add_files(task_files, task, "tasks")
    if problems:
        raise ConfigError("\n".join([f"{job.path} cannot be submitted.", *problems]))
    size = sum(os.path.getsize(file) for file in files)
    if size > MOST_BYTES:
        raise ConfigError(
            f"The files of {job.path} have {size:,} bytes; at most {MOST_BYTES:,} can be sent with a job.",
            "Put them where the cluster can read them, and write the absolute path or URI.",
        )
    return sorted(files)


def _pack(job: JobFile, folder: Path) -> tuple[str, str]:
    """Copy a job file and the files it names into a folder, at the same places relative to each other.

    Names that lead out of the working directory (``../texts/a.txt``) keep their meaning: the copy of the working
    directory lies as deep in the folder as those names go up.

    Returns:
        The copy of the working directory, relative to the folder (``.`` for the folder itself), and the name of the
        job file in it.
    """
    files = _local_files(job)
    levels = max((Path(file).parts.count("..") for file in files), default=0)
    names: list[str] = []  # of the last folders of the path of the working directory, as many as the names go up
    if levels:
        names = [*Path.cwd().parts[1:]][-levels:]
    missing = ["_"] * (levels - len(names))  # The names go up beyond the root of the file system.
    root = folder.joinpath(*missing, *names)
    for file in files:
        target = Path(os.path.normpath(root / file))
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / file).parent.mkdir(parents=True, exist_ok=True)  # a/../b.txt is found only where a exists
        shutil.copy(file, target)
    root.mkdir(parents=True, exist_ok=True)
    name = job.path.name
    while (root / name).exists():
        name = f"job-{name}"
    shutil.copy(job.path, root / name)
    return str(root.relative_to(folder)), name


def _entrypoint(directory: str, name: str, options: Sequence[str]) -> str:
    """Return the shell command that runs a packed job."""
    path = f"./{name}" if name.startswith("-") else name
    command = shlex.join(["avss", "run", path, *options])
    if directory == ".":
        return command
    return f"cd {shlex.quote(directory)} && exec {command}"
