"""What answers at the address of a job server: another program, another version, text that a terminal would obey."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.command_line import avss
from support.job_server import JOB, SILENCE, VERSION_ANSWER, Answer, JobServer, job_server

from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.runs import submission
from avss_dist.runs.job_file import read_job
from avss_dist.runs.submission import Cluster

HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202e"


@pytest.fixture
def server() -> Iterator[JobServer]:
    with job_server() as made:
        yield made


@pytest.mark.parametrize(
    "answers",
    [
        {"*": b"[]"},
        {"*": b"<html>a router</html>"},
        {"/api/version": VERSION_ANSWER, "/api/jobs": b'{"jobs": 3}'},
        {"/api/version": VERSION_ANSWER, "/api/jobs": b'[{"status": "DANCING"}]'},
    ],
    ids=["list", "html", "other", "status"],
)
def test_another_server_is_an_error_without_a_traceback(answers: dict[str, bytes], server: JobServer) -> None:
    server.answers = answers
    done = avss("jobs", "list", "--address", server.address)
    assert done.exit_code in (1, 2)
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr


def test_a_terminal_obeys_no_job(server: JobServer) -> None:
    job = {"type": "SUBMISSION", "submission_id": f"avss-{HOSTILE}", "status": "SUCCEEDED", "entrypoint": f"x{HOSTILE}"}
    server.answers = {"/api/version": VERSION_ANSWER, "/api/jobs": json.dumps([job]).encode()}
    done = avss("jobs", "list", "--address", server.address)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "owned" in done.stdout and not set(HOSTILE) & {"\x1b", "\x07", "\u202e"} & set(done.stdout)


REASON = "'nowhere' is no folder."
LOG = f"12:00:00 a line\nError: {REASON}\nRun avss doctor.\nError: a later one\n"


@pytest.mark.parametrize(
    ("message", "log", "shown"),
    [
        (LOG, "", REASON),
        ("the last lines of many", LOG, REASON),
        ("", "a-0: failed. There is no memory.\n1 run: 1 failed.\n", "a-0: failed. There is no memory."),
        ("", "nothing that tells", "Job entrypoint command failed with exit code 2, last available logs"),
    ],
    ids=["tail", "long log", "failed run", "unknown"],
)
def test_a_failed_job_is_listed_with_the_first_error_of_its_log(
    message: str, log: str, shown: str, server: JobServer
) -> None:
    says = f"Job entrypoint command failed with exit code 2, last available logs\n{message}"
    times = {"start_time": 1_000_000, "end_time": 1_042_400}
    job = {**JOB, "status": "FAILED", "message": says, "driver_exit_code": 2, **times}
    server.answers = {"/api/version": VERSION_ANSWER, "/api/jobs": json.dumps([job]).encode()}
    server.answers["/api/jobs/avss-a/logs"] = json.dumps({"logs": log}).encode()
    done = avss("jobs", "list", "--address", server.address, "--format", "json")
    listed = json.loads(done.stdout)
    assert (listed["message"], listed["seconds"]) == (shown, 42)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "command",
    [["jobs", "list"], ["jobs", "logs", "a"], ["jobs", "logs", "a", "--follow"], ["jobs", "stop", "a"]],
    ids=" ".join,
)
def test_a_server_that_never_answers_ends_a_command(command: list[str], silent: str) -> None:
    done = avss(*command, "--address", silent, "--answer-seconds", "0.2")
    assert done.exit_code == 1
    assert done.stderr.startswith(
        f"Error: The job server at {silent} closed the connection or did not answer in time.\n"
    )
    assert "larger --connect-seconds or --answer-seconds" in done.stderr


@pytest.fixture
def dripping() -> Iterator[str]:
    """The address of a server whose answer comes byte by byte, and has no end."""
    over = threading.Event()

    def drip(client: socket.socket) -> None:
        with client, suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
            while not over.wait(0.05):
                client.sendall(b"[")

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=[server.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        over.set()


@pytest.mark.parametrize("command", [["jobs", "list"], ["jobs", "logs", "a"], ["jobs", "stop", "a"]], ids=" ".join)
def test_an_answer_must_be_whole_in_time(command: list[str], dripping: str) -> None:
    """Each byte comes sooner than the limit."""
    done = avss(*command, "--address", dripping, "--connect-seconds", "0.3", "--answer-seconds", "0.3")
    assert done.exit_code == 1
    assert done.stderr.startswith(
        f"Error: The job server at {dripping} closed the connection or did not answer in time.\n"
    )


@pytest.mark.parametrize("call", ["jobs", "job", "logs", "follow", "stop", "submit"])
def test_every_request_has_a_limit(call: str, server: JobServer, tmp_path: Path) -> None:
    """The server answered first, and is silent from then on."""
    server.answers = {"/api/version": VERSION_ANSWER, "*": SILENCE}
    cluster = Cluster(server.address, answer_seconds=0.2)
    (tmp_path / "job.yaml").write_text("warehouse: /w\nmodels: [/m]\ncorpora: ['builtin:pydoc']\n")
    arguments = {"jobs": (), "submit": (read_job(tmp_path / "job.yaml", expand=False),)}
    with pytest.raises(RunFailed, match="did not answer in time"):
        list(getattr(cluster, call)(*arguments.get(call, ("avss-a",))))


def test_a_log_that_says_nothing_ends_with_its_job(server: JobServer) -> None:
    """The log's connection was lost without a word; the job has ended meanwhile."""
    jobs = "/api/jobs/avss-a"
    running = json.dumps(JOB).encode()
    server.answers = {"/api/version": VERSION_ANSWER, jobs: running, f"{jobs}/logs/tail": SILENCE}
    cluster = Cluster(server.address, answer_seconds=0.2)
    log = cluster.follow("avss-a")
    threading.Timer(0.5, server.answers.update, [{jobs: json.dumps({**JOB, "status": "SUCCEEDED"}).encode()}]).start()
    assert list(log) == []


def test_a_job_that_does_not_stop_is_reported(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = "/api/jobs/avss-a"
    server.answers = {"/api/version": VERSION_ANSWER, f"{jobs}/stop": b'{"stopped": true}'}
    server.answers[jobs] = json.dumps(JOB).encode()
    monkeypatch.setattr(submission, "STOP_SECONDS", 0.5)
    assert Cluster(server.address).stop("avss-a") == "it was signalled, and has not ended."


@pytest.mark.parametrize("redirected", ["/api/version", "/api/jobs"])
def test_a_redirect_is_not_followed(redirected: str, server: JobServer, silent: str) -> None:
    server.answers = {"/api/version": VERSION_ANSWER, redirected: f"{silent}/login".encode()}
    with pytest.raises(ConfigError, match=f"redirects to another address: {silent}/login"):
        Cluster(server.address).jobs()


def test_an_answer_of_any_length_is_not_taken(server: JobServer) -> None:
    server.answers = {"/api/version": VERSION_ANSWER, "*": Answer(body=bytes(1 << 20), repeat=10**6)}
    with pytest.raises(RunFailed, match="failed: an answer is longer than 67"):
        Cluster(server.address).jobs()
